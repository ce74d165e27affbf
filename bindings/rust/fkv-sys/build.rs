// SPDX-License-Identifier: Apache-2.0
//! Says where libfkv is: in FKV_LIB_DIR, or where pkg-config finds it.
use std::env;
use std::path::{Path, PathBuf};
use std::process::{exit, Command};

/// The oldest libfkv that has all functions of the bindings.
const MINIMUM: &str = "0.1.0";

fn main() {
    println!("cargo:rerun-if-changed=build.rs");
    for name in [
        "FKV_LIB_DIR",
        "FKV_STATIC",
        "PKG_CONFIG",
        "PKG_CONFIG_PATH",
        "PKG_CONFIG_LIBDIR",
        "PKG_CONFIG_SYSROOT_DIR",
    ] {
        println!("cargo:rerun-if-env-changed={}", name);
    }
    let shared = !matches!(env::var("FKV_STATIC").as_deref(), Ok("1"));
    let found = match env::var_os("FKV_LIB_DIR") {
        Some(dir) if !dir.is_empty() => in_directory(Path::new(&dir), shared),
        _ => with_pkg_config(shared),
    };
    if let Err(reason) = found {
        eprintln!("fkv-sys: {}", reason);
        eprintln!("Do one of these:");
        eprintln!("  - install libfkv, so that `pkg-config --libs fkv` works; if it is installed");
        eprintln!("    elsewhere, set PKG_CONFIG_PATH to the directory of fkv.pc;");
        eprintln!("  - set FKV_LIB_DIR to the directory of libfkv.so, for example to the");
        eprintln!("    directory libfkv/ of a meson build.");
        exit(1);
    }
}

fn in_directory(dir: &Path, shared: bool) -> Result<(), String> {
    let file = dir.join(if shared { "libfkv.so" } else { "libfkv.a" });
    if !file.is_file() {
        return Err(format!(
            "FKV_LIB_DIR is set, but there is no {}",
            file.display()
        ));
    }
    let dir = dir.to_str().ok_or("FKV_LIB_DIR is not UTF-8")?;
    search(dir);
    if shared {
        println!("cargo:rustc-link-lib=dylib=fkv");
    } else {
        println!("cargo:rerun-if-changed={}", file.display());
        println!("cargo:rustc-link-lib=static=fkv");
        for library in ["jansson", "m", "pthread"] {
            println!("cargo:rustc-link-lib=dylib={}", library);
        }
    }
    Ok(())
}

/// Dependent build scripts read the directory as DEP_FKV_LIB_DIR.
fn search(dir: &str) {
    println!("cargo:rustc-link-search=native={}", dir);
    println!("cargo:lib_dir={}", dir);
}

fn pkg_config(arguments: &[&str]) -> Result<String, String> {
    let program = env::var_os("PKG_CONFIG").unwrap_or_else(|| "pkg-config".into());
    let output = Command::new(&program)
        .args(arguments)
        .output()
        .map_err(|e| {
            format!(
                "FKV_LIB_DIR is not set, and {:?} does not run: {}",
                program, e
            )
        })?;
    if !output.status.success() {
        let text = String::from_utf8_lossy(&output.stderr);
        return Err(format!(
            "FKV_LIB_DIR is not set, and pkg-config says:\n{}",
            text.trim_end()
        ));
    }
    String::from_utf8(output.stdout).map_err(|_| "pkg-config's output is not UTF-8".into())
}

fn with_pkg_config(shared: bool) -> Result<(), String> {
    let wanted = format!("fkv >= {}", MINIMUM);
    pkg_config(&["--print-errors", "--exists", &wanted])?;
    if !shared {
        let dir = pkg_config(&["--variable=libdir", "fkv"])?;
        return in_directory(&PathBuf::from(dir.trim()), false);
    }
    for flag in pkg_config(&["--libs", "fkv"])?.split_whitespace() {
        if let Some(dir) = flag.strip_prefix("-L") {
            search(dir);
        } else if let Some(library) = flag.strip_prefix("-l") {
            println!("cargo:rustc-link-lib=dylib={}", library);
        }
    }
    Ok(())
}
