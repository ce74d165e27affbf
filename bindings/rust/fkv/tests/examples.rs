// SPDX-License-Identifier: Apache-2.0
//! The examples run, and the guide shows the first of them.

macro_rules! example {
    ($name:ident) => {
        mod $name {
            include!(concat!("../examples/", stringify!($name), ".rs"));

            #[test]
            fn runs() {
                main().unwrap();
            }
        }
    };
}

example!(first);
example!(calibrate);
example!(threads);

#[test]
fn the_guide_shows_the_first_example() {
    let guide = include_str!("../../../../docs/rust.md");
    let shown = guide
        .split("```rust\n")
        .nth(1)
        .and_then(|rest| rest.split("```").next());
    assert_eq!(
        shown.expect("a program"),
        include_str!("../examples/first.rs")
    );
}
