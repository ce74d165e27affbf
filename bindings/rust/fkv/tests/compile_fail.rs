// SPDX-License-Identifier: Apache-2.0
//! Programs that must not compile. Each file of compile_fail/ marks its fault, `// FAULT E0382`, on the
//! lines that only the fault has. As it stands it must fail with that very error and no other; without
//! those lines, its twin must compile, so that it is the fault that fails.
use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

struct Case {
    name: String,
    text: String,
}

impl Case {
    fn fault(&self) -> &str {
        let codes: BTreeSet<&str> = self
            .text
            .lines()
            .filter_map(|line| line.split("// FAULT ").nth(1))
            .map(str::trim)
            .collect();
        assert_eq!(codes.len(), 1, "{}: one fault expected", self.name);
        codes.into_iter().next().unwrap()
    }

    fn twin(&self) -> String {
        let lines = self.text.lines().filter(|line| !line.contains("// FAULT "));
        lines.map(|line| format!("{line}\n")).collect()
    }
}

fn cases() -> Vec<Case> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/compile_fail");
    let mut cases: Vec<Case> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            Case {
                name,
                text: fs::read_to_string(path).unwrap(),
            }
        })
        .collect();
    cases.sort_by(|a, b| a.name.cmp(&b.name));
    cases
}

/// A package of its own that uses the safe crate, with these programs.
fn package(name: &str, programs: &[(&str, String)]) -> PathBuf {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join(name);
    let bin = dir.join("src/bin");
    let _ = fs::remove_dir_all(&bin);
    fs::create_dir_all(&bin).unwrap();
    let manifest = format!(
        "[package]\nname = \"{name}\"\nversion = \"0.0.0\"\nedition = \"2021\"\n\
         [dependencies]\nfkv = {{ path = {:?} }}\n[workspace]\n",
        env!("CARGO_MANIFEST_DIR")
    );
    fs::write(dir.join("Cargo.toml"), manifest).unwrap();
    for (program, text) in programs {
        fs::write(bin.join(program).with_extension("rs"), text).unwrap();
    }
    dir
}

/// Whether it compiles, and what the compiler says.
fn check(dir: &Path, arguments: &[&str]) -> (bool, String) {
    let output = Command::new(env!("CARGO"))
        .args(["check", "--offline", "--quiet", "--color=never"])
        .args(arguments)
        .current_dir(dir)
        .env("CARGO_TARGET_DIR", dir.join("target"))
        .env_remove("LD_PRELOAD") // a sanitizer's, for the tests only
        .output()
        .unwrap();
    (
        output.status.success(),
        String::from_utf8_lossy(&output.stderr).into_owned(),
    )
}

#[test]
fn without_its_fault_each_compiles() {
    let cases = cases();
    assert!(cases.len() >= 12, "only {} cases", cases.len());
    let programs: Vec<_> = cases.iter().map(|c| (c.name.as_str(), c.twin())).collect();
    let (compiles, errors) = check(&package("twins", &programs), &["--bins"]);
    assert!(compiles, "{errors}");
}

#[test]
fn with_its_fault_each_fails_for_it() {
    let cases = cases();
    let programs: Vec<_> = cases
        .iter()
        .map(|c| (c.name.as_str(), c.text.clone()))
        .collect();
    let dir = package("faults", &programs);
    for case in &cases {
        let (compiles, errors) = check(&dir, &["--bin", &case.name]);
        assert!(!compiles, "{} compiles", case.name);
        let codes: BTreeSet<&str> = errors
            .lines()
            .filter_map(|line| line.strip_prefix("error["))
            .filter_map(|rest| rest.split(']').next())
            .collect();
        let expected = BTreeSet::from([case.fault()]);
        assert_eq!(codes, expected, "{}:\n{errors}", case.name);
    }
}
