// SPDX-License-Identifier: Apache-2.0
//! Safe bindings of libfkv, a KV-cache library for language-model inference.
//!
//! A [`Cache`] holds the keys and values of many sequences over all layers of one model, exactly or
//! Fourier-coded, as its [`Profile`] says. A [`Plan`] describes one step: which sequences get how many
//! new tokens. Attention runs on what is held.
//!
//! ```
//! use fkv::{Batch, Cache, Context, Dtype, ModelParams, Plan, Profile, TensorMut, TensorRef};
//!
//! # fn main() -> fkv::Result<()> {
//! let context = Context::new()?;
//! let model = ModelParams::new(1, 2, 1, 64); // layers, query heads, KV heads, head_dim
//! let profile = Profile::exact(&context, &model, Dtype::F16)?;
//! let mut cache = Cache::new(&context, &profile)?;
//! let sequence = cache.create_sequence()?;
//! let mut plan = Plan::new(&cache)?;
//!
//! let mut batch = Batch::new();
//! batch.push(&sequence, 3); // three new tokens
//! plan.update(&cache, &batch)?;
//!
//! let (q, kv) = (vec![0.5f32; 3 * 2 * 64], vec![0.25f32; 3 * 64]);
//! let mut out = vec![0f32; 3 * 2 * 64];
//! let q = TensorRef::new(&q, &[3, 2, 64])?;
//! let kv = TensorRef::new(&kv, &[3, 1, 64])?;
//! plan.append_attend(
//!     &mut cache,
//!     0, // layer
//!     &q,
//!     &kv,
//!     &kv,
//!     &mut TensorMut::new(&mut out, &[3, 2, 64])?,
//!     None,
//! )?;
//! assert_eq!(out[0], 0.25);
//! # Ok(())
//! # }
//! ```
//!
//! # What the compiler checks
//!
//! The library says: on one cache, attends of different plans may run at the same time; append, sequence
//! creation and freeing are writers, and a writer beside anything else is refused with BUSY. Here that is
//! Rust's own rule: readers take `&Cache`, writers take `&mut Cache`, and BUSY never comes. One plan and
//! one calibrator serve one thread at a time: their calls take `&mut self`, or they are not [`Sync`].
//!
//! | type | `Send` | `Sync` |
//! |---|---|---|
//! | [`Context`], [`Profile`] | yes | yes |
//! | [`Cache`] | yes | yes: readers in many threads, a writer alone |
//! | [`Plan`], [`Calibrator`] | yes | no: one thread at a time |
//! | [`TensorRef`], [`TensorMut`], [`Sequence`], [`Batch`] | yes | yes |
//!
//! A closed object, a freed sequence or a buffer that is gone cannot be named any more:
//!
//! ```compile_fail,E0382
//! # use fkv::*;
//! # fn f(cache: Cache, mut plan: Plan, batch: Batch<'_>) -> Result<()> {
//! drop(cache);
//! plan.update(&cache, &batch) // use of moved value
//! # }
//! ```
//!
//! # Errors
//!
//! Every fallible call returns [`Result`]; its [`Error`] has the library's [`Status`] and message. On any
//! status but [`Status::Device`] nothing has changed and no output was written.
//!
//! The manual behind this crate is the header `fkv/fkv.h`: shapes, limits and the errors of each
//! function. Where a parameter of 0 means a default there, it does here.
#![deny(unsafe_op_in_unsafe_fn)]
#![warn(missing_docs)]
#![warn(clippy::undocumented_unsafe_blocks)]

mod allocation;
mod cache;
mod calibrator;
mod code;
mod context;
mod convert;
mod error;
mod fidelity;
mod half;
mod model;
mod plan;
mod profile;
mod select;
mod tensor;

pub use allocation::{AllocationInfo, AllocationParams};
pub use cache::{Cache, CacheParams, Sequence, SequenceParams, Stats};
pub use calibrator::{Calibrator, CalibratorParams};
pub use code::{
    Backend, Channel, Coding, CpuLevel, Criterion, Domain, Dtype, Outgrow, Part, Restoration,
    RopeLayout, Statistic, Status, Target,
};
pub use context::{Context, ContextInfo, ContextParams};
pub use error::{Error, Result};
pub use fidelity::Fidelity;
pub use half::{Bf16, F16};
pub use model::{CodecParams, FourierParams, ModelParams};
pub use plan::{Batch, Plan};
pub use profile::{Profile, ProfileInfo};
pub use select::{SelectParams, Selection};
pub use tensor::{Element, TensorMut, TensorRef};

/// The C interface, for what this crate leaves out.
pub use fkv_sys as sys;

/// Largest `head_dim`.
pub const MAX_HEAD_DIM: usize = sys::FKV_MAX_HEAD_DIM as usize;
/// Largest number of sink tokens.
pub const MAX_SINK: usize = sys::FKV_MAX_SINK as usize;
/// Largest top_k of a selection.
pub const MAX_TOP_K: usize = sys::FKV_MAX_TOP_K as usize;
/// Largest scope of a selection, in tokens.
pub const MAX_SCOPE: usize = sys::FKV_MAX_SCOPE as usize;
/// Number of dimensions that a tensor can have.
pub const MAX_NDIM: usize = sys::FKV_MAX_NDIM as usize;

/// "MAJOR.MINOR.PATCH" of the library that was loaded.
pub fn version() -> &'static str {
    // SAFETY: the function has no preconditions and returns a static text.
    unsafe { convert::static_text(sys::fkv_version_string()) }
}

/// ABI number of the library that was loaded. A [`Context`] is refused if it is not that of the header
/// which these bindings were made from.
pub fn abi_version() -> u32 {
    // SAFETY: the function has no preconditions.
    unsafe { sys::fkv_abi_version() }
}

/// The programs of the guide, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../../../docs/rust.md")]
struct Guide;
