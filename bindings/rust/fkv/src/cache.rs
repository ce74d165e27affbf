// SPDX-License-Identifier: Apache-2.0
use crate::convert::{count, int32, int64, Struct};
use crate::{sys, Context, Error, Profile, Result, Status, TensorMut};
use std::fmt;
use std::ops::Range;
use std::ptr::NonNull;

/// How a [`Cache`] is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CacheParams {
    /// Tokens of one sequence. 0: the context's limit.
    pub max_tokens: u64,
    /// Bytes of cached data. 0: the context's limit.
    pub max_bytes: u64,
    /// Holds an index beside the keys of each sealed block, so that selection finds what it would find
    /// without, faster. For calibrated profiles that hold keys unrotated.
    pub key_index: bool,
}

const KEY_INDEX: u64 = sys::FKV_CACHE_KEY_INDEX as u64;

impl Default for CacheParams {
    fn default() -> Self {
        // SAFETY: the init function of this very struct.
        let raw = unsafe { sys::fkv_cache_params::defaults(sys::fkv_cache_params_init) };
        CacheParams {
            max_tokens: raw.max_tokens,
            max_bytes: raw.max_bytes,
            key_index: raw.flags & KEY_INDEX != 0,
        }
    }
}

/// How a [`Sequence`] is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SequenceParams {
    /// Period of the Fourier coding, in tokens: for best quality, just above the length that the sequence
    /// will have, less sinks and local tokens. 0: the profile's. Ignored by exact profiles.
    pub period: usize,
}

impl Default for SequenceParams {
    fn default() -> Self {
        // SAFETY: the init function of this very struct.
        let raw = unsafe { sys::fkv_sequence_params::defaults(sys::fkv_sequence_params_init) };
        SequenceParams {
            period: count(raw.period),
        }
    }
}

/// Counted bytes and tokens. Bytes are those really allocated; tokens are not multiplied by layers.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Stats {
    /// Sequences counted.
    pub sequences: u64,
    /// Tokens held.
    pub tokens: u64,
    /// Of these, tokens held exactly in all channels (layer 0).
    pub tokens_exact: u64,
    /// Of these, tokens of the coded middle (layer 0).
    pub tokens_coded: u64,
    /// Everything below together.
    pub bytes: u64,
    /// Sinks, tail, and middle that is not coded.
    pub bytes_exact: u64,
    /// Exactly kept channels of the coded middle.
    pub bytes_kept: u64,
    /// Fourier coefficients.
    pub bytes_coefficients: u64,
    /// Means, gains, page tables, and (for all sequences) tables that sequences share.
    pub bytes_tables: u64,
    /// What the same tokens take as dense f16.
    pub dense_bytes: u64,
    /// dense_bytes / bytes; 0 while nothing is held.
    pub ratio: f64,
    /// Of bytes, those that several sequences hold since a fork.
    pub bytes_shared: u64,
    /// Calibrated: residuals and exact channels of sealed blocks.
    pub bytes_blocks: u64,
    /// Calibrated: scales and zero points of sealed blocks.
    pub bytes_scales: u64,
    /// Indices of keys: [`CacheParams::key_index`].
    pub bytes_index: u64,
}

impl Stats {
    pub(crate) fn from_raw(raw: &sys::fkv_stats) -> Self {
        Stats {
            sequences: raw.sequences,
            tokens: raw.tokens,
            tokens_exact: raw.tokens_exact,
            tokens_coded: raw.tokens_coded,
            bytes: raw.bytes,
            bytes_exact: raw.bytes_exact,
            bytes_kept: raw.bytes_kept,
            bytes_coefficients: raw.bytes_coefficients,
            bytes_tables: raw.bytes_tables,
            dense_bytes: raw.dense_bytes,
            ratio: raw.ratio,
            bytes_shared: raw.bytes_shared,
            bytes_blocks: raw.bytes_blocks,
            bytes_scales: raw.bytes_scales,
            bytes_index: raw.bytes_index,
        }
    }
}

/// Which cache something is of. The library never uses a handle's value twice.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct CacheId(usize);

/// A sequence of a [`Cache`], which holds its data: dropping this frees nothing before the cache goes, so
/// give it to [`Cache::free_sequence`] instead. It cannot be copied, so that a freed one is not used:
///
/// ```compile_fail,E0382
/// # fn f(cache: &mut fkv::Cache, sequence: fkv::Sequence) -> fkv::Result<()> {
/// cache.free_sequence(sequence)?;
/// cache.sequence_length(&sequence)?; // use of moved value
/// # Ok(())
/// # }
/// ```
#[derive(Debug, PartialEq, Eq, Hash)]
#[must_use = "a sequence is held until it is given to Cache::free_sequence() or the cache goes"]
pub struct Sequence {
    pub(crate) id: sys::fkv_sequence,
    pub(crate) cache: CacheId,
}

impl Sequence {
    /// Number of the sequence within its cache; never used twice.
    pub fn id(&self) -> i64 {
        self.id
    }
}

/// The keys and values of many sequences over all layers, under one [`Profile`].
///
/// Readers take `&self` and may run in many threads at once, attends of different plans among them.
/// Writers take `&mut self`.
///
/// ```compile_fail,E0502
/// # use fkv::*;
/// # fn f(mut cache: Cache, mut plan: Plan, q: TensorRef<'_>, mut out: TensorMut<'_>) {
/// std::thread::scope(|scope| {
///     scope.spawn(|| plan.attend(&cache, 0, &q, &mut out, None));
///     cache.create_sequence() // a writer beside a reader
/// });
/// # }
/// ```
pub struct Cache {
    context: Context,
    raw: NonNull<sys::fkv_cache>,
}

// SAFETY: the header lets a cache be used and destroyed from any thread.
unsafe impl Send for Cache {}
// SAFETY: what takes &Cache here is a reader, and the header lets readers run at the same time. (A writer
// beside them would be refused with BUSY; it is never a race.)
unsafe impl Sync for Cache {}

impl Drop for Cache {
    /// Frees all sequences. Plans on the cache are useless from then on.
    fn drop(&mut self) {
        // SAFETY: a handle of ours, not yet destroyed. Every call on it, and every call of a plan on it,
        // borrows the cache, so that none is running: the error BUSY cannot come.
        unsafe { sys::fkv_cache_destroy(self.as_raw()) };
    }
}

impl Cache {
    /// An empty cache within the context's limits. Errors: Invalid, NoMemory, Limit, Unsupported.
    pub fn new(context: &Context, profile: &Profile) -> Result<Self> {
        Cache::with_params(context, profile, &CacheParams::default())
    }

    /// An empty cache with limits of its own. Errors as [`new`](Self::new).
    pub fn with_params(context: &Context, profile: &Profile, params: &CacheParams) -> Result<Self> {
        // SAFETY: the init function of this very struct.
        let mut raw_params = unsafe { sys::fkv_cache_params::defaults(sys::fkv_cache_params_init) };
        raw_params.max_tokens = params.max_tokens;
        raw_params.max_bytes = params.max_bytes;
        raw_params.flags = if params.key_index { KEY_INDEX } else { 0 };
        // SAFETY: living handles; the struct lives through the call. The library keeps the profile.
        let raw = context.create(|out| unsafe {
            sys::fkv_cache_create(context.as_raw(), profile.as_raw(), &raw_params, out)
        })?;
        Ok(Cache {
            context: context.clone(),
            raw,
        })
    }

    /// An empty sequence with the profile's period. Errors: NoMemory, Limit.
    pub fn create_sequence(&mut self) -> Result<Sequence> {
        self.create_sequence_with(&SequenceParams::default())
    }

    /// An empty sequence. Errors: Invalid, NoMemory, Limit.
    pub fn create_sequence_with(&mut self, params: &SequenceParams) -> Result<Sequence> {
        let mut id = 0;
        // SAFETY: the init function of this very struct.
        let mut raw = unsafe { sys::fkv_sequence_params::defaults(sys::fkv_sequence_params_init) };
        raw.period = int64("period", params.period)?;
        // SAFETY: a living handle; the struct lives through the call.
        let status = unsafe { sys::fkv_sequence_create(self.as_raw(), &raw, &mut id) };
        self.context.check(status)?;
        Ok(Sequence {
            id,
            cache: self.id(),
        })
    }

    /// Frees a sequence and its memory. Errors: Handle (of another cache).
    pub fn free_sequence(&mut self, sequence: Sequence) -> Result<()> {
        self.owns(&sequence)?;
        // SAFETY: a living handle; the library checks the id.
        let status = unsafe { sys::fkv_sequence_free(self.as_raw(), sequence.id) };
        self.context.check(status)
    }

    /// A new sequence that holds what `sequence` holds; pages are shared until one of the two writes to
    /// them. Errors: Handle (of another cache), State (layers of unequal length), NoMemory, Limit.
    pub fn fork_sequence(&mut self, sequence: &Sequence) -> Result<Sequence> {
        self.owns(sequence)?;
        let mut id = 0;
        // SAFETY: a living handle; the library checks the id.
        let status = unsafe { sys::fkv_sequence_fork(self.as_raw(), sequence.id, &mut id) };
        self.context.check(status)?;
        Ok(Sequence {
            id,
            cache: self.id(),
        })
    }

    /// Drops the newest tokens so that `tokens` are left: any length from [`Cache::crop_limit`] on, and
    /// of shorter ones those that [`Cache::crop_floor`] names.
    /// Errors: Handle (of another cache), Invalid (more than there are), State (another length).
    pub fn crop_sequence(&mut self, sequence: &Sequence, tokens: usize) -> Result<()> {
        self.owns(sequence)?;
        let tokens = int64("tokens", tokens)?;
        // SAFETY: a living handle; the library checks the id.
        let status = unsafe { sys::fkv_sequence_crop(self.as_raw(), sequence.id, tokens) };
        self.context.check(status)
    }

    /// The smallest length from which on [`Cache::crop_sequence`] takes every one.
    /// Errors: Handle (of another cache).
    pub fn crop_limit(&self, sequence: &Sequence) -> Result<usize> {
        self.owns(sequence)?;
        let mut limit = 0;
        // SAFETY: a living handle; the library checks the id.
        let status =
            unsafe { sys::fkv_sequence_crop_limit(self.as_raw(), sequence.id, &mut limit) };
        self.context.check(status)?;
        Ok(count(limit))
    }

    /// The greatest length, no more than `tokens`, that [`Cache::crop_sequence`] takes.
    /// Errors: Handle (of another cache), Invalid (more than there are).
    pub fn crop_floor(&self, sequence: &Sequence, tokens: usize) -> Result<usize> {
        self.owns(sequence)?;
        let (tokens, mut possible) = (int64("tokens", tokens)?, 0);
        // SAFETY: a living handle; the library checks the id.
        let status = unsafe {
            sys::fkv_sequence_crop_floor(self.as_raw(), sequence.id, tokens, &mut possible)
        };
        self.context.check(status)?;
        Ok(count(possible))
    }

    /// Number of tokens that every layer holds. Errors: Handle (of another cache).
    pub fn sequence_length(&self, sequence: &Sequence) -> Result<usize> {
        self.owns(sequence)?;
        let mut tokens = 0;
        // SAFETY: a living handle; the library checks the id.
        let status = unsafe { sys::fkv_sequence_length(self.as_raw(), sequence.id, &mut tokens) };
        self.context.check(status)?;
        Ok(count(tokens))
    }

    /// Reads back what is held of some tokens, as attention sees it: keys after RoPE, the coded channels
    /// reconstructed. `k` and `v` are `[tokens.len(), Hk, D]`. For inspection: slow.
    /// Errors: Handle (of another cache), Invalid, NoMemory.
    pub fn read(
        &self,
        sequence: &Sequence,
        layer: usize,
        tokens: Range<usize>,
        k: Option<&mut TensorMut<'_>>,
        v: Option<&mut TensorMut<'_>>,
    ) -> Result<()> {
        self.owns(sequence)?;
        let (layer, first) = (int32("layer", layer)?, int64("tokens", tokens.start)?);
        let tokens = tokens
            .end
            .checked_sub(tokens.start)
            .ok_or_else(|| Error::invalid("tokens: the range ends before it starts"))?;
        let tokens = int64("tokens", tokens)?;
        let k = k.map_or(std::ptr::null(), |k| k.as_raw() as *const _);
        let v = v.map_or(std::ptr::null(), |v| v.as_raw() as *const _);
        // SAFETY: a living handle; each tensor is NULL or describes memory that is borrowed exclusively
        // through the call.
        self.context.check(unsafe {
            sys::fkv_sequence_read(self.as_raw(), sequence.id, layer, first, tokens, k, v)
        })
    }

    /// Bytes and tokens of all sequences.
    pub fn stats(&self) -> Result<Stats> {
        self.stats_of(sys::FKV_ALL_SEQUENCES.into())
    }

    /// Bytes and tokens of one sequence. Errors: Handle (of another cache).
    pub fn sequence_stats(&self, sequence: &Sequence) -> Result<Stats> {
        self.owns(sequence)?;
        self.stats_of(sequence.id)
    }

    fn stats_of(&self, sequence: sys::fkv_sequence) -> Result<Stats> {
        let mut raw = sys::fkv_stats::empty();
        // SAFETY: a living handle, and a struct that states its size.
        let status = unsafe { sys::fkv_cache_stats(self.as_raw(), sequence, &mut raw) };
        self.context.check(status)?;
        Ok(Stats::from_raw(&raw))
    }

    /// The C handle, still owned by this cache.
    pub fn as_raw(&self) -> *mut sys::fkv_cache {
        self.raw.as_ptr()
    }

    pub(crate) fn context(&self) -> &Context {
        &self.context
    }

    pub(crate) fn id(&self) -> CacheId {
        CacheId(self.raw.as_ptr() as usize)
    }

    /// Ids of two caches may be equal numbers, so the library could not tell.
    fn owns(&self, sequence: &Sequence) -> Result<()> {
        if sequence.cache == self.id() {
            return Ok(());
        }
        Err(Error::new(
            Status::Handle,
            "the sequence is of another cache",
        ))
    }
}

impl fmt::Debug for Cache {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Cache").field(&self.stats()).finish()
    }
}
