// SPDX-License-Identifier: Apache-2.0
//! Numbers, texts and structs on their way to C and back.
use crate::{sys, Error, Result};
use std::ffi::{CStr, CString};
use std::mem::MaybeUninit;
use std::os::raw::c_char;

pub(crate) fn int32(name: &str, value: usize) -> Result<i32> {
    i32::try_from(value).map_err(|_| Error::invalid(format!("{name}: {value} is too large")))
}

pub(crate) fn int64(name: &str, value: usize) -> Result<i64> {
    i64::try_from(value).map_err(|_| Error::invalid(format!("{name}: {value} is too large")))
}

/// A count that the library wrote; they are never negative.
pub(crate) fn count(value: i64) -> usize {
    usize::try_from(value).unwrap_or(0)
}

pub(crate) fn c_string(name: &str, bytes: impl Into<Vec<u8>>) -> Result<CString> {
    CString::new(bytes).map_err(|_| Error::invalid(format!("{name}: contains a zero byte")))
}

/// # Safety
/// `text` is a zero-terminated text that is never freed or changed.
pub(crate) unsafe fn static_text(text: *const c_char) -> &'static str {
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(text) }.to_str().unwrap_or("")
}

/// Structs of the header: plain numbers, pointers and optional functions, so that all zeros are a value.
///
/// # Safety
/// All bytes zero must be a valid value, and the first field is `struct_size: u32`.
pub(crate) unsafe trait Struct: Sized {
    fn set_size(&mut self, size: u32);

    /// Zeros and the struct's size: what a query function is given to fill.
    fn empty() -> Self {
        // SAFETY: zeros are a value, as the trait demands.
        let mut value: Self = unsafe { MaybeUninit::zeroed().assume_init() };
        value.set_size(std::mem::size_of::<Self>() as u32);
        value
    }

    /// The defaults, from the struct's _init function.
    ///
    /// # Safety
    /// `init` writes at most the given number of bytes.
    unsafe fn defaults(init: unsafe extern "C" fn(*mut Self, usize) -> sys::fkv_status) -> Self {
        let mut value = Self::empty();
        // SAFETY: `value` has the size that is passed. The one error is a size below the first version of
        // the struct, which this struct's cannot be; `value` would keep its zeros, and be valid.
        let status = unsafe { init(&mut value, std::mem::size_of::<Self>()) };
        debug_assert_eq!(status, sys::FKV_OK);
        value
    }
}

macro_rules! structs {
    ($($name:ident)*) => {$(
        // SAFETY: #[repr(C)], of integers, floats, pointers and Option<extern fn>; struct_size is first.
        unsafe impl Struct for sys::$name {
            fn set_size(&mut self, size: u32) {
                self.struct_size = size;
            }
        }
    )*};
}

structs! {
    fkv_tensor fkv_context_params fkv_context_info fkv_model_params fkv_fourier_params
    fkv_profile_info fkv_calibrator_params fkv_cache_params fkv_sequence_params fkv_stats fkv_batch
    fkv_codec_params fkv_select_params fkv_selection fkv_allocation_params fkv_allocation_info
    fkv_fidelity
}
