// SPDX-License-Identifier: Apache-2.0
//! The checked-in Rust declarations against the header as the C compiler understands it. (bindgen's own
//! layout tests compare the declarations with numbers that bindgen wrote beside them.)
//!
//! FKV_INCLUDE_DIR names another directory with fkv/fkv.h, CC another compiler.
#![allow(clippy::unnecessary_cast)] // a macro's casts are needed for some of its arguments only
use fkv_sys::*;
use std::collections::BTreeSet;
use std::env;
use std::fmt::Write as _;
use std::mem::{align_of, size_of, MaybeUninit};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What Rust says, and the C program that says the same, line by line.
#[derive(Default)]
struct Facts {
    rust: String,
    c: String,
    names: BTreeSet<&'static str>,
}

macro_rules! structs {
    ($facts:ident, $($name:ident { $($field:ident)* })*) => {$(
        // Does not compile if a field is missing in the list.
        let _complete = |value: $name| {
            let $name { $($field: _),* } = value;
        };
        let place = MaybeUninit::<$name>::zeroed();
        let base = place.as_ptr();
        $facts.names.insert(stringify!($name));
        writeln!($facts.rust, "{} {} {}", stringify!($name), size_of::<$name>(), align_of::<$name>())
            .unwrap();
        writeln!(
            $facts.c,
            "    printf(\"{0} %zu %zu\\n\", sizeof({0}), _Alignof({0}));",
            stringify!($name)
        )
        .unwrap();
        $(
            // SAFETY: within `place`; only addresses are taken, and zeros are valid for every field.
            let (field, bytes) = unsafe {
                (std::ptr::addr_of!((*base).$field) as usize, std::mem::size_of_val(&(*base).$field))
            };
            let offset = field - base as usize;
            writeln!($facts.rust, "{}.{} {} {}", stringify!($name), stringify!($field), offset, bytes)
                .unwrap();
            writeln!(
                $facts.c,
                "    printf(\"{0}.{1} %zu %zu\\n\", offsetof({0}, {1}), sizeof((({0} *)0)->{1}));",
                stringify!($name),
                stringify!($field)
            )
            .unwrap();
        )*
    )*};
}

macro_rules! integers {
    ($facts:ident, $($name:ident)*) => {$(
        $facts.names.insert(stringify!($name));
        let negative = (0 as $name).wrapping_sub(1) < (1 as $name);
        writeln!($facts.rust, "{} {} {}", stringify!($name), size_of::<$name>(), negative as i32)
            .unwrap();
        writeln!(
            $facts.c,
            "    printf(\"{0} %zu %d\\n\", sizeof({0}), ({0})-1 < ({0})1);",
            stringify!($name)
        )
        .unwrap();
    )*};
}

macro_rules! constants {
    ($facts:ident, $($name:ident)*) => {$(
        $facts.names.insert(stringify!($name));
        writeln!($facts.rust, "{} {}", stringify!($name), $name as i64).unwrap();
        writeln!($facts.c, "    printf(\"{0} %lld\\n\", (long long){0});", stringify!($name)).unwrap();
    )*};
}

fn facts() -> Facts {
    let mut facts = Facts::default();
    structs! { facts,
        fkv_tensor { struct_size dtype device device_id data byte_length ndim reserved shape strides }
        fkv_context_params {
            struct_size backend threads cpu_level flags alloc free alloc_user max_bytes max_tokens
            max_file_bytes message message_bytes
            device_id reserved module_path stream
        }
        fkv_context_info {
            struct_size backend threads cpu_level live_bytes peak_bytes best_cpu_level has_cuda
        }
        fkv_model_params {
            struct_size n_layers n_q_heads n_kv_heads head_dim rope_layout rope_dim inv_freq_count
            inv_freq rope_scaling softmax_scale model_id
        }
        fkv_fourier_params {
            struct_size storage_dtype coefficient_dtype bins n_sink n_local restoration outgrow period
            min_middle
        }
        fkv_profile_info {
            struct_size coding n_layers n_q_heads n_kv_heads head_dim rope_layout rope_dim storage_dtype
            coefficient_dtype bins n_sink n_local restoration outgrow reserved period min_middle
            k_fourier_channels v_fourier_channels softmax_scale group block domain reserved2 k_bits v_bits
        }
        fkv_codec_params { struct_size storage_dtype group block n_sink n_local domain spectral_bins }
        fkv_calibrator_params { struct_size criterion fourier codec }
        fkv_allocation_params { struct_size target value tokens levels weights weights_count }
        fkv_allocation_info {
            struct_size reserved predicted_loss carrier_loss bits ratio tokens
        }
        fkv_cache_params { struct_size reserved max_tokens max_bytes flags }
        fkv_sequence_params { struct_size reserved period }
        fkv_stats {
            struct_size reserved sequences tokens tokens_exact tokens_coded bytes bytes_exact bytes_kept
            bytes_coefficients bytes_tables dense_bytes ratio
            bytes_shared bytes_blocks bytes_scales bytes_index
        }
        fkv_fidelity {
            struct_size reserved fraction blocks blocks_missed samples block_error block_error_max lse_bias
            lse_error lse_error_max weight output_error output_error_max
        }
        fkv_batch { struct_size count sequences n_new positions positions_count }
        fkv_select_params { struct_size n_global n_local span top_k clip chunk reserved }
        fkv_selection {
            struct_size layer tokens view middle_first middle_end spans
        }
    }
    integers! { facts,
        fkv_status fkv_dtype fkv_device fkv_backend fkv_cpu_level fkv_rope_layout fkv_restoration
        fkv_outgrow fkv_part fkv_coding fkv_domain fkv_criterion fkv_statistic fkv_target
        fkv_sequence
    }
    constants! { facts,
        FKV_VERSION_MAJOR FKV_VERSION_MINOR FKV_VERSION_PATCH FKV_ABI_VERSION FKV_MAX_HEAD_DIM
        FKV_MAX_SINK FKV_MAX_NDIM FKV_MAX_TOP_K FKV_MAX_SCOPE FKV_CONTEXT_PROPAGATE_NONFINITE
        FKV_CACHE_KEY_INDEX FKV_ALL_SEQUENCES FKV_ALL_LAYERS FKV_OK
        FKV_ERR_INVALID FKV_ERR_HANDLE FKV_ERR_STATE FKV_ERR_NOMEM FKV_ERR_LIMIT FKV_ERR_NONFINITE
        FKV_ERR_IO FKV_ERR_FORMAT FKV_ERR_CHECKSUM FKV_ERR_VERSION FKV_ERR_MISMATCH
        FKV_ERR_UNSUPPORTED FKV_ERR_DEVICE FKV_ERR_BUSY FKV_ERR_BUFFER FKV_DTYPE_NONE FKV_DTYPE_F32
        FKV_DTYPE_F16 FKV_DTYPE_BF16 FKV_DEVICE_CPU FKV_DEVICE_CUDA FKV_BACKEND_CPU FKV_BACKEND_CUDA
        FKV_CPU_BEST FKV_CPU_REFERENCE FKV_CPU_AVX2 FKV_CPU_AVX512 FKV_ROPE_NONE FKV_ROPE_HALF_SPLIT
        FKV_ROPE_INTERLEAVED FKV_RESTORE_LEAST_SQUARES FKV_RESTORE_AUTHORS FKV_OUTGROW_SEGMENT
        FKV_OUTGROW_ERROR FKV_PART_K FKV_PART_V FKV_CHANNEL_CARRIER FKV_CHANNEL_FOURIER
        FKV_CHANNEL_2BIT FKV_CHANNEL_3BIT FKV_CHANNEL_4BIT FKV_CHANNEL_8BIT FKV_CHANNEL_EXACT
        FKV_CODING_EXACT FKV_CODING_FOURIER FKV_CODING_CALIBRATED FKV_DOMAIN_ROTATED
        FKV_DOMAIN_UNROTATED FKV_CRITERION_RESIDUAL FKV_CRITERION_PUBLISHED FKV_CRITERION_SENSITIVITY FKV_STATISTIC_MEAN FKV_STATISTIC_VARIANCE
        FKV_STATISTIC_SENSITIVITY FKV_STATISTIC_QUERY FKV_STATISTIC_SLOW_SHARE FKV_STATISTIC_LOSS
        FKV_TARGET_RATIO FKV_TARGET_BITS FKV_TARGET_LOSS
    }
    facts
}

fn include_dir() -> PathBuf {
    match env::var_os("FKV_INCLUDE_DIR") {
        Some(dir) => dir.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../include"),
    }
}

/// Without what a sanitizer run preloads into the tests: it is not for compilers.
fn command(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = Command::new(program);
    command.env_remove("LD_PRELOAD");
    command
}

/// The output of a C program with this body of main().
fn run_c(name: &str, body: &str) -> String {
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.c"));
    let program = source.with_extension("");
    let text = format!(
        "#include <fkv/fkv.h>\n#include <stdio.h>\nint main(void) {{\n{body}    return 0;\n}}\n"
    );
    std::fs::write(&source, text).unwrap();
    let compiler = env::var("CC").unwrap_or_else(|_| "cc".into());
    let mut words = compiler.split_whitespace();
    let compiled = command(words.next().unwrap_or("cc"))
        .args(words)
        .args(["-std=c11", "-Werror", "-I"])
        .arg(include_dir())
        .arg(&source)
        .arg("-o")
        .arg(&program)
        .output()
        .expect("a C compiler, named by CC or called cc");
    let errors = String::from_utf8_lossy(&compiled.stderr);
    assert!(
        compiled.status.success(),
        "the header has another layout:\n{errors}"
    );
    let output = command(&program).output().unwrap();
    assert!(output.status.success());
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn layouts_and_values_are_those_of_the_header() {
    let facts = facts();
    let c = run_c("layout", &facts.c);
    let differences: Vec<_> = facts
        .rust
        .lines()
        .zip(c.lines())
        .filter(|(rust, c)| rust != c)
        .map(|(rust, c)| format!("Rust: {rust}, C: {c}"))
        .collect();
    assert!(differences.is_empty(), "{}", differences.join("\n"));
    assert_eq!(facts.rust.lines().count(), c.lines().count());
    assert!(facts.rust.lines().count() > 150);
}

/// The names of `bindings.rs` that begin with one of these, up to any other character.
fn declared(prefixes: &[&str]) -> BTreeSet<&'static str> {
    let text = include_str!("../src/bindings.rs");
    let names = text.lines().filter_map(|line| {
        let rest = prefixes.iter().find_map(|&prefix| {
            line.strip_prefix(prefix)
                .filter(|rest| rest.to_lowercase().starts_with("fkv_"))
        })?;
        rest.split(|c: char| !c.is_ascii_alphanumeric() && c != '_')
            .next()
    });
    names.collect()
}

#[test]
fn no_struct_integer_or_constant_is_left_out() {
    // Opaque handles have no layout, enums no values but their constants, functions no size of interest.
    let left_out = |name: &&str| {
        let opaque = ["context", "profile", "calibrator", "cache", "plan"];
        name.ends_with("_code")
            || name.ends_with("_fn")
            || opaque.iter().any(|kind| *name == format!("fkv_{kind}"))
    };
    let mut expected = declared(&["pub struct ", "pub type ", "pub const "]);
    expected.retain(|name| !left_out(name));
    assert_eq!(facts().names, expected);
}
