// SPDX-License-Identifier: Apache-2.0
//! The C interface of libfkv, declaration by declaration: `bindings.rs` is what bindgen makes of
//! `include/fkv/fkv.h`, which is also the manual of every function here. The crate `fkv` is the safe
//! interface on top; use this one for what it leaves out, such as an allocator of your own.
//!
//! ```
//! use std::ffi::CStr;
//!
//! // SAFETY: the returned text is static and ends with a zero.
//! let version = unsafe { CStr::from_ptr(fkv_sys::fkv_version_string()) };
//! println!("libfkv {}", version.to_str().unwrap());
//! ```
//!
//! Enumerations are plain constants, as the C functions take plain integers: `FKV_DTYPE_F16 as
//! fkv_dtype`.
#![no_std]
#![allow(non_camel_case_types)]
// The header's own words: shapes such as [tokens, heads, D] are no links.
#![allow(
    rustdoc::broken_intra_doc_links,
    rustdoc::bare_urls,
    rustdoc::invalid_html_tags
)]
#![allow(clippy::all, clippy::undocumented_unsafe_blocks)]

extern crate std; // for the names of C's types only

include!("bindings.rs");
