// SPDX-License-Identifier: Apache-2.0
use crate::convert::{count, int32, Struct};
use crate::{sys, Backend, CpuLevel, Error, Result, Status, TensorMut, TensorRef};
use std::ffi::CStr;
use std::fmt;
use std::os::raw::c_char;
use std::ptr::NonNull;
use std::sync::Arc;

/// Room for the text of any error; the library's own are shorter.
const MESSAGE_BYTES: usize = 512;

/// How a [`Context`] is made: take the defaults and set fields.
///
/// ```
/// # fn main() -> fkv::Result<()> {
/// let mut params = fkv::ContextParams::default();
/// params.threads = 2;
/// params.max_bytes = 1 << 30;
/// let context = fkv::Context::with_params(&params)?;
/// assert_eq!(context.info()?.threads, 2);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ContextParams {
    /// Where to compute.
    pub backend: Backend,
    /// Threads that work on one call, the caller's included. 0: one for each online processor.
    pub threads: usize,
    /// A level that the processor lacks is [`Status::Unsupported`].
    pub cpu_level: CpuLevel,
    /// Lets NaN and infinity pass in k, v and q instead of refusing them.
    pub propagate_nonfinite: bool,
    /// Bytes that all objects of the context may hold together. 0: no limit.
    pub max_bytes: u64,
    /// Tokens of one sequence. 0: 2^26.
    pub max_tokens: u64,
    /// Size of a file or text to be parsed. 0: 64 MiB.
    pub max_file_bytes: u64,
}

impl Default for ContextParams {
    fn default() -> Self {
        // SAFETY: the init function of this very struct.
        let raw = unsafe { sys::fkv_context_params::defaults(sys::fkv_context_params_init) };
        ContextParams {
            backend: Backend::from_raw(raw.backend),
            threads: count(raw.threads.into()),
            cpu_level: CpuLevel::from_raw(raw.cpu_level),
            propagate_nonfinite: raw.flags & PROPAGATE_NONFINITE != 0,
            max_bytes: raw.max_bytes,
            max_tokens: raw.max_tokens,
            max_file_bytes: raw.max_file_bytes,
        }
    }
}

const PROPAGATE_NONFINITE: u64 = sys::FKV_CONTEXT_PROPAGATE_NONFINITE as u64;

/// What a context is and holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct ContextInfo {
    /// Where it computes.
    pub backend: Backend,
    /// Threads that work on one call.
    pub threads: usize,
    /// The level in use; never [`CpuLevel::Best`].
    pub cpu_level: CpuLevel,
    /// Bytes now held by all objects of the context.
    pub live_bytes: u64,
    /// The most that `live_bytes` ever was.
    pub peak_bytes: u64,
    /// Best level that this processor and library offer.
    pub best_cpu_level: CpuLevel,
    /// Whether the CUDA backend is built in.
    pub has_cuda: bool,
}

/// Owns the C handle; the last clone of the context and the last object made from it end it.
struct Handle(NonNull<sys::fkv_context>);

// SAFETY: the header lets any number of threads share a context, and lets any of them destroy it; Drop has
// the handle alone.
unsafe impl Send for Handle {}
// SAFETY: as above.
unsafe impl Sync for Handle {}

impl Drop for Handle {
    fn drop(&mut self) {
        // SAFETY: a handle of ours, not yet destroyed. No call on it is running, as it is not borrowed:
        // the only other error, BUSY, cannot come.
        unsafe { sys::fkv_context_destroy(self.0.as_ptr()) };
    }
}

/// Threads, memory and limits. Cheap to clone; every object made from a context keeps it.
#[derive(Clone)]
pub struct Context {
    handle: Arc<Handle>,
}

impl Context {
    /// A context with the defaults: all processors, no limit.
    pub fn new() -> Result<Self> {
        Context::with_params(&ContextParams::default())
    }

    /// A context. Errors: Unsupported, NoMemory, Limit, Invalid, Device; Version if the loaded library's
    /// ABI is not that of these bindings.
    pub fn with_params(params: &ContextParams) -> Result<Self> {
        check_abi()?;
        let mut text = [0 as c_char; MESSAGE_BYTES];
        // SAFETY: the init function of this very struct.
        let mut raw = unsafe { sys::fkv_context_params::defaults(sys::fkv_context_params_init) };
        raw.backend = params.backend.to_raw();
        raw.threads = int32("threads", params.threads)?;
        raw.cpu_level = params.cpu_level.to_raw();
        raw.flags = if params.propagate_nonfinite {
            PROPAGATE_NONFINITE
        } else {
            0
        };
        raw.max_bytes = params.max_bytes;
        raw.max_tokens = params.max_tokens;
        raw.max_file_bytes = params.max_file_bytes;
        raw.message = text.as_mut_ptr();
        raw.message_bytes = text.len() as u64;
        let mut out = std::ptr::null_mut();
        // SAFETY: `raw` and what it points to live through the call, `message` with the size stated.
        let status = unsafe { sys::fkv_context_create(&raw, &mut out) };
        match NonNull::new(out) {
            Some(handle) if status == sys::FKV_OK => Ok(Context {
                handle: Arc::new(Handle(handle)),
            }),
            _ => Err(Error::new(Status::from_raw(status), text_of(&text))),
        }
    }

    /// Takes over a context that was made with the C interface, for example with an allocator.
    ///
    /// # Safety
    /// `raw` is the result of [`sys::fkv_context_create`], and is destroyed by nobody else.
    pub unsafe fn from_raw(raw: *mut sys::fkv_context) -> Result<Self> {
        check_abi()?;
        match NonNull::new(raw) {
            Some(handle) => Ok(Context {
                handle: Arc::new(Handle(handle)),
            }),
            None => Err(Error::invalid("the context is NULL")),
        }
    }

    /// CUDA: the stream, a cudaStream_t of the context's device, of all later calls.
    /// Errors: Unsupported (the CPU has no streams), Device.
    ///
    /// # Safety
    /// `stream` lives until another replaces it or the last object of the context is gone, and no other
    /// call runs on the context's objects meanwhile.
    pub unsafe fn set_stream(&self, stream: *mut std::ffi::c_void) -> Result<()> {
        // SAFETY: a living handle; the stream is as the caller promises.
        self.check(unsafe { sys::fkv_context_set_stream(self.as_raw(), stream) })
    }

    /// Waits for what was asked of the device so far; at once on the CPU. Errors: Device.
    pub fn synchronize(&self) -> Result<()> {
        // SAFETY: a living handle.
        self.check(unsafe { sys::fkv_context_synchronize(self.as_raw()) })
    }

    /// The C handle, still owned by this context.
    pub fn as_raw(&self) -> *mut sys::fkv_context {
        self.handle.0.as_ptr()
    }

    /// What the context is and now holds.
    pub fn info(&self) -> Result<ContextInfo> {
        let mut raw = sys::fkv_context_info::empty();
        // SAFETY: a living handle, and a struct that states its size.
        self.check(unsafe { sys::fkv_context_query(self.as_raw(), &mut raw) })?;
        Ok(ContextInfo {
            backend: Backend::from_raw(raw.backend),
            threads: count(raw.threads.into()),
            cpu_level: CpuLevel::from_raw(raw.cpu_level),
            live_bytes: raw.live_bytes,
            peak_bytes: raw.peak_bytes,
            best_cpu_level: CpuLevel::from_raw(raw.best_cpu_level),
            has_cuda: raw.has_cuda != 0,
        })
    }

    /// Text of the last error of this context, in any thread; empty if there was none. An [`Error`] has
    /// it already.
    pub fn message(&self) -> String {
        let mut text = [0 as c_char; MESSAGE_BYTES];
        // SAFETY: a living handle and a buffer of the stated size. A longer text is cut off, and still
        // ends with a zero.
        let status = unsafe {
            sys::fkv_context_message(
                self.as_raw(),
                text.as_mut_ptr(),
                text.len(),
                std::ptr::null_mut(),
            )
        };
        match Status::from_raw(status) {
            Status::Ok | Status::Buffer => text_of(&text),
            _ => String::new(),
        }
    }

    /// Merges attention over disjoint sets of tokens: `out_a` and `out_b` are `[tokens, Hq, D]`, `lse_a`
    /// and `lse_b` `[tokens, Hq]` of f32. The result replaces `out_a` and `lse_a`. Errors: Invalid.
    ///
    /// ```
    /// # use fkv::{Context, TensorMut, TensorRef};
    /// # fn main() -> fkv::Result<()> {
    /// let context = Context::new()?;
    /// let (mut out, mut lse) = ([1f32; 8], [0f32]);
    /// context.merge(
    ///     &mut TensorMut::new(&mut out, &[1, 1, 8])?,
    ///     &mut TensorMut::new(&mut lse, &[1, 1])?,
    ///     &TensorRef::new(&[3f32; 8], &[1, 1, 8])?,
    ///     &TensorRef::new(&[0f32], &[1, 1])?,
    /// )?;
    /// assert_eq!(out, [2f32; 8]); // equal weights
    /// assert!((lse[0] - 2f32.ln()).abs() < 1e-6);
    /// # Ok(())
    /// # }
    /// ```
    pub fn merge(
        &self,
        out_a: &mut TensorMut<'_>,
        lse_a: &mut TensorMut<'_>,
        out_b: &TensorRef<'_>,
        lse_b: &TensorRef<'_>,
    ) -> Result<()> {
        // SAFETY: a living handle; each tensor describes memory that is borrowed for its lifetime, that
        // of outputs exclusively, and the library keeps within its byte_length.
        self.check(unsafe {
            sys::fkv_merge(
                self.as_raw(),
                out_a.as_raw(),
                lse_a.as_raw(),
                out_b.as_raw(),
                lse_b.as_raw(),
            )
        })
    }

    /// Turns a status into a result, with the context's text.
    pub(crate) fn check(&self, status: sys::fkv_status) -> Result<()> {
        if status == sys::FKV_OK {
            return Ok(());
        }
        Err(Error::new(Status::from_raw(status), self.message()))
    }

    /// Calls a function that makes an object, and returns the object's handle.
    pub(crate) fn create<T>(
        &self,
        function: impl FnOnce(*mut *mut T) -> sys::fkv_status,
    ) -> Result<NonNull<T>> {
        let mut out = std::ptr::null_mut();
        self.check(function(&mut out))?;
        NonNull::new(out).ok_or_else(|| Error::new(Status::Handle, "the library returned NULL"))
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").finish_non_exhaustive()
    }
}

/// Called once for each context, so that everything behind it can rely on the layouts.
fn check_abi() -> Result<()> {
    let loaded = crate::abi_version();
    if loaded == sys::FKV_ABI_VERSION {
        return Ok(());
    }
    Err(Error::new(
        Status::Version,
        format!(
            "libfkv {} has ABI {loaded}, these bindings were made for ABI {}",
            crate::version(),
            sys::FKV_ABI_VERSION
        ),
    ))
}

/// The text in a buffer that the library wrote or left as zeros.
fn text_of(buffer: &[c_char; MESSAGE_BYTES]) -> String {
    debug_assert!(buffer.contains(&0));
    // SAFETY: the library ends what it writes with a zero, within the buffer; else all bytes are zero.
    unsafe { CStr::from_ptr(buffer.as_ptr()) }
        .to_string_lossy()
        .into_owned()
}
