// SPDX-License-Identifier: Apache-2.0
use crate::cache::CacheId;
use crate::convert::{int32, Struct};
use crate::{
    sys, Cache, Context, Error, Result, SelectParams, Selection, Sequence, Status, TensorMut,
    TensorRef,
};
use std::fmt;
use std::marker::PhantomData;
use std::ptr::NonNull;

/// A step: which sequences get how many new tokens.
///
/// ```compile_fail,E0505
/// # use fkv::*;
/// # fn f(cache: &mut Cache, plan: &mut Plan, sequence: Sequence) -> Result<()> {
/// let mut batch = Batch::new();
/// batch.push(&sequence, 1);
/// cache.free_sequence(sequence)?; // cannot move out of `sequence`: the batch borrows it
/// plan.update(cache, &batch)
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct Batch<'a> {
    sequences: Vec<sys::fkv_sequence>,
    caches: Vec<CacheId>,
    n_new: Vec<i64>,
    positions: Option<&'a [i64]>,
    borrowed: PhantomData<&'a Sequence>,
}

impl<'a> Batch<'a> {
    /// A step without sequences.
    pub fn new() -> Self {
        Batch::default()
    }

    /// Adds a sequence, which must not be in the batch yet, with `n_new` new tokens; 0 is allowed.
    pub fn push(&mut self, sequence: &'a Sequence, n_new: usize) -> &mut Self {
        self.sequences.push(sequence.id);
        self.caches.push(sequence.cache);
        // The largest number is as much beyond every limit as the one given: the library refuses it.
        self.n_new.push(i64::try_from(n_new).unwrap_or(i64::MAX));
        self
    }

    /// RoPE positions, 0..2^31-1, of every new token in batch order. Without them, a token's position is
    /// its index in its sequence.
    pub fn set_positions(&mut self, positions: &'a [i64]) -> &mut Self {
        self.positions = Some(positions);
        self
    }
}

/// One step's ragged batch, prepared once and used by every layer.
///
/// Each call names the cache that the plan was made on, shared or exclusively, as the call reads or writes
/// it: so a plan can lie beside its cache in a struct, and threads with a plan each can attend on one
/// `&Cache`. Another cache is refused with Handle.
///
/// One thread at a time: a plan can be sent to another thread, but not shared.
///
/// ```compile_fail,E0277
/// # fn f(plan: &fkv::Plan) {
/// std::thread::scope(|scope| {
///     scope.spawn(|| println!("{plan:?}")); // cannot be shared between threads safely
/// });
/// # }
/// ```
pub struct Plan {
    context: Context,
    raw: NonNull<sys::fkv_plan>,
    cache: CacheId,
}

// SAFETY: the header lets a plan be used from any thread, one at a time. It is not Sync.
unsafe impl Send for Plan {}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: a handle of ours, not yet destroyed, and not in use as it is not borrowed. A plan may
        // outlive its cache.
        unsafe { sys::fkv_plan_destroy(self.as_raw()) };
    }
}

impl Plan {
    /// An empty plan on a cache. Errors: NoMemory, Limit.
    pub fn new(cache: &Cache) -> Result<Self> {
        // SAFETY: a living handle.
        let raw = cache
            .context()
            .create(|out| unsafe { sys::fkv_plan_create(cache.as_raw(), out) })?;
        Ok(Plan {
            context: cache.context().clone(),
            raw,
            cache: cache.id(),
        })
    }

    /// Sets the step. Allocates the workspace, so that the calls of the layers allocate nothing but cached
    /// data. Errors: Handle (of another cache), Invalid, State (layers of unequal length), Limit,
    /// NoMemory.
    pub fn update(&mut self, cache: &Cache, batch: &Batch<'_>) -> Result<()> {
        self.is_on(cache)?;
        if batch.caches.iter().any(|&of| of != self.cache) {
            return Err(Error::new(
                Status::Handle,
                "batch: a sequence is of another cache",
            ));
        }
        // SAFETY: the init function of this very struct.
        let mut raw = unsafe { sys::fkv_batch::defaults(sys::fkv_batch_init) };
        raw.count = int32("batch", batch.sequences.len())?;
        raw.sequences = batch.sequences.as_ptr();
        raw.n_new = batch.n_new.as_ptr();
        if let Some(positions) = batch.positions {
            raw.positions = positions.as_ptr();
            raw.positions_count = positions.len() as i64; // a slice has at most isize::MAX bytes
        }
        // SAFETY: a living handle; the arrays have the lengths stated and live through the call.
        let status = unsafe { sys::fkv_plan_update(self.as_raw(), &raw) };
        self.context.check(status)
    }

    /// Attends within a finite scope from the next [`Plan::update`] on, or, with None, to everything again.
    /// The cache must have a calibrated profile with unrotated keys.
    /// Errors: Invalid, Unsupported (another profile).
    pub fn select(&mut self, params: Option<&SelectParams>) -> Result<()> {
        let raw = params.map(SelectParams::raw);
        let pointer = raw.as_ref().map_or(std::ptr::null(), |raw| raw as *const _);
        // SAFETY: a living handle; the struct, if any, lives through the call.
        let status = unsafe { sys::fkv_plan_select(self.as_raw(), pointer) };
        self.context.check(status)
    }

    /// What the last queries of a sequence (`index` in the batch) saw in the last attention.
    /// Errors: Invalid (index), State (no attention with selection since the last update).
    pub fn selection(&self, index: usize) -> Result<Selection> {
        let index = int32("index", index)?;
        let mut raw = sys::fkv_selection::empty();
        let mut ends = Vec::new();
        loop {
            // SAFETY: a living handle, a struct that states its size, and room for the count stated.
            let status = unsafe {
                sys::fkv_plan_selection(
                    self.as_raw(),
                    index,
                    &mut raw,
                    ends.as_mut_ptr(),
                    ends.len(),
                )
            };
            if status == sys::FKV_ERR_BUFFER && ends.len() < 2 * raw.spans as usize {
                ends = vec![0i64; 2 * raw.spans as usize];
                continue;
            }
            self.context.check(status)?;
            return Ok(Selection::from_raw(&raw, &ends));
        }
    }

    /// CUDA: tells that a graph with the step's calls of all layers was launched once more.
    /// Errors: Handle (of another cache), State (a layer has had this step), Unsupported, Device.
    pub fn replayed(&mut self, cache: &mut Cache) -> Result<()> {
        self.is_on(cache)?;
        // SAFETY: a living handle, of a cache that is borrowed exclusively.
        let status = unsafe { sys::fkv_plan_replayed(self.as_raw()) };
        self.context.check(status)
    }

    /// Stores the step's new tokens of one layer: `k` and `v` `[tokens, Hk, D]`, before RoPE.
    /// Errors: Handle (of another cache), Invalid, State (the layer has had this step, or the plan is
    /// outdated), NonFinite, NoMemory, Limit.
    pub fn append(
        &mut self,
        cache: &mut Cache,
        layer: usize,
        k: &TensorRef<'_>,
        v: &TensorRef<'_>,
    ) -> Result<()> {
        self.is_on(cache)?;
        let layer = int32("layer", layer)?;
        // SAFETY: a living handle; each tensor describes memory that is borrowed through the call.
        let status = unsafe { sys::fkv_append(self.as_raw(), layer, k.as_raw(), v.as_raw()) };
        self.context.check(status)
    }

    /// Attention of the step's tokens: `q` and `out` `[tokens, Hq, D]`, `q` before RoPE; `lse`
    /// `[tokens, Hq]` of f32. After [`append`](Self::append) of this step and layer each token sees all
    /// tokens up to itself; before it, those of earlier steps only, which is the part to
    /// [`merge`](Context::merge) with attention done elsewhere. A token that sees nothing gets 0 and
    /// -infinity. Errors: Handle (of another cache), Invalid, State (the plan is outdated), NonFinite,
    /// NoMemory.
    pub fn attend(
        &mut self,
        cache: &Cache,
        layer: usize,
        q: &TensorRef<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
    ) -> Result<()> {
        self.is_on(cache)?;
        let layer = int32("layer", layer)?;
        let lse = lse.map_or(std::ptr::null(), |lse| lse.as_raw() as *const _);
        // SAFETY: a living handle; each tensor describes memory that is borrowed through the call, that
        // of outputs exclusively.
        let status =
            unsafe { sys::fkv_attend(self.as_raw(), layer, q.as_raw(), out.as_raw(), lse) };
        self.context.check(status)
    }

    /// [`append`](Self::append) and [`attend`](Self::attend) in one, attending before anything new is
    /// coded: the step's own tokens, and the local window behind each, are seen exactly. This is the call
    /// for prefill and decode. Errors: those of both.
    #[allow(clippy::too_many_arguments)] // the C function's, in its order
    pub fn append_attend(
        &mut self,
        cache: &mut Cache,
        layer: usize,
        q: &TensorRef<'_>,
        k: &TensorRef<'_>,
        v: &TensorRef<'_>,
        out: &mut TensorMut<'_>,
        lse: Option<&mut TensorMut<'_>>,
    ) -> Result<()> {
        self.is_on(cache)?;
        let layer = int32("layer", layer)?;
        let lse = lse.map_or(std::ptr::null(), |lse| lse.as_raw() as *const _);
        // SAFETY: a living handle; each tensor describes memory that is borrowed through the call, that
        // of outputs exclusively.
        self.context.check(unsafe {
            sys::fkv_append_attend(
                self.as_raw(),
                layer,
                q.as_raw(),
                k.as_raw(),
                v.as_raw(),
                out.as_raw(),
                lse,
            )
        })
    }

    /// The C handle, still owned by this plan.
    pub fn as_raw(&self) -> *mut sys::fkv_plan {
        self.raw.as_ptr()
    }

    /// Borrowing a cache says something about this plan only if it is the plan's.
    fn is_on(&self, cache: &Cache) -> Result<()> {
        if cache.id() == self.cache {
            return Ok(());
        }
        Err(Error::new(Status::Handle, "the plan is of another cache"))
    }
}

impl fmt::Debug for Plan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Plan").finish_non_exhaustive()
    }
}
