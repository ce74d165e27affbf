// SPDX-License-Identifier: Apache-2.0
//! Everything of the header can be reached through the safe crate: each function, field and constant of
//! bindings.rs is used in its sources, or listed here with the reason.
use std::collections::BTreeSet;
use std::path::Path;

/// Fields and constants that the safe crate leaves out.
const LEFT_OUT: &[(&str, &str)] = &[
    ("alloc", "hooks are unsafe: fkv-sys and Context::from_raw"),
    ("free", "see alloc"),
    ("alloc_user", "see alloc"),
    (
        "module_path",
        "loading code is unsafe: fkv-sys and Context::from_raw",
    ),
    ("stream", "Context::set_stream"),
    ("reserved", "zero"),
    ("reserved2", "zero"),
    ("device", "a slice is in the memory of the host, 0"),
    ("device_id", "see device"),
    ("FKV_DEVICE_CPU", "see device"),
    ("FKV_DEVICE_CUDA", "see device"),
    (
        "FKV_VERSION_MAJOR",
        "version() tells that of the loaded library; tested in fkv-sys",
    ),
    ("FKV_VERSION_MINOR", "see FKV_VERSION_MAJOR"),
    ("FKV_VERSION_PATCH", "see FKV_VERSION_MAJOR"),
];

fn read(path: &str) -> String {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// The crate's sources without comments.
fn sources() -> String {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut text = String::new();
    for entry in std::fs::read_dir(dir).unwrap() {
        for line in std::fs::read_to_string(entry.unwrap().path())
            .unwrap()
            .lines()
        {
            text.push_str(line.split("//").next().unwrap_or(""));
            text.push('\n');
        }
    }
    text
}

fn is_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

/// The names that follow `prefix` at the start of a line, with this indentation.
fn names_after<'a>(text: &'a str, prefix: &'a str) -> BTreeSet<&'a str> {
    let rest = text.lines().filter_map(|line| line.strip_prefix(prefix));
    rest.map(|rest| rest.split(|c| !is_name(c)).next().unwrap_or(""))
        .collect()
}

/// Whether the name stands in the text behind one of these, and not as part of a longer name.
fn is_used(text: &str, name: &str, behind: &[&str]) -> bool {
    behind.iter().any(|before| {
        let wanted = format!("{before}{name}");
        text.match_indices(&wanted)
            .any(|(at, _)| !text[at + wanted.len()..].starts_with(is_name))
    })
}

fn assert_all_used(names: &BTreeSet<&str>, behind: &[&str]) {
    let sources = sources();
    let left_out = |name: &str| LEFT_OUT.iter().any(|(known, _)| *known == name);
    for name in names {
        let used = is_used(&sources, name, behind);
        assert!(
            used || left_out(name),
            "{name} is not used in the safe crate"
        );
        assert!(
            !(used && left_out(name)),
            "{name} is used, and yet listed as left out"
        );
    }
}

#[test]
fn every_function_is_used() {
    let bindings = read("../fkv-sys/src/bindings.rs");
    let functions = names_after(&bindings, "    pub fn ");
    assert!(functions.len() >= 45, "{functions:?}");
    assert!(functions.iter().all(|name| name.starts_with("fkv_")));
    assert_all_used(&functions, &["sys::"]);
    // And no other symbol: the list that the linker has is the same.
    let map = read("../../../libfkv/libfkv.map");
    let exported: BTreeSet<&str> = map
        .lines()
        .filter_map(|line| line.trim().strip_suffix(';'))
        .filter(|n| n.starts_with("fkv_"))
        .collect();
    assert_eq!(functions, exported);
}

#[test]
fn every_field_is_used() {
    let bindings = read("../fkv-sys/src/bindings.rs");
    let mut fields = names_after(&bindings, "    pub ");
    fields.remove("fn");
    assert!(fields.len() > 60, "{fields:?}");
    assert_all_used(&fields, &["raw.", "raw_params.", "self."]);
}

#[test]
fn every_constant_is_used() {
    let bindings = read("../fkv-sys/src/bindings.rs");
    let constants = names_after(&bindings, "pub const ");
    assert!(constants.len() > 50, "{constants:?}");
    assert_all_used(&constants, &["sys::", "= "]);
}

#[test]
fn the_check_can_fail() {
    assert!(is_used("sys::fkv_append(x)", "fkv_append", &["sys::"]));
    assert!(!is_used(
        "sys::fkv_append_attend(x)",
        "fkv_append",
        &["sys::"]
    ));
    assert!(!is_used("fkv_append(x)", "fkv_append", &["sys::"]));
}
