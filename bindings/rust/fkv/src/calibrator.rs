// SPDX-License-Identifier: Apache-2.0
use crate::convert::{int32, Struct};
use crate::{
    sys, Context, Criterion, FourierParams, ModelParams, Part, Profile, Result, TensorRef,
};
use std::fmt;
use std::ptr::NonNull;

/// How a [`Calibrator`] is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CalibratorParams {
    /// What makes a channel cheap to compress.
    pub criterion: Criterion,
    /// The coding to calibrate for, which the solved profile will have.
    pub fourier: FourierParams,
}

impl Default for CalibratorParams {
    fn default() -> Self {
        // SAFETY: the init function of this very struct.
        let raw = unsafe { sys::fkv_calibrator_params::defaults(sys::fkv_calibrator_params_init) };
        CalibratorParams {
            criterion: Criterion::from_raw(raw.criterion),
            fourier: FourierParams::default(),
        }
    }
}

/// Running statistics of a model's keys and values, from which a [`Profile`] is solved.
///
/// One thread at a time: it can be sent to another thread, but not shared.
///
/// ```compile_fail,E0277
/// # fn f(calibrator: fkv::Calibrator) {
/// std::thread::scope(|scope| {
///     scope.spawn(|| calibrator.solve_published_shares()); // cannot be shared between threads
/// });
/// # }
/// ```
pub struct Calibrator {
    context: Context,
    raw: NonNull<sys::fkv_calibrator>,
    channels: usize, // Hk * D
}

// SAFETY: the header lets a calibrator be used from any thread, one at a time. It is not Sync.
unsafe impl Send for Calibrator {}

impl Drop for Calibrator {
    fn drop(&mut self) {
        // SAFETY: a handle of ours, not yet destroyed, and not in use as it is not borrowed.
        unsafe { sys::fkv_calibrator_destroy(self.as_raw()) };
    }
}

impl Calibrator {
    /// Errors: Invalid, NoMemory.
    pub fn new(context: &Context, model: &ModelParams, params: &CalibratorParams) -> Result<Self> {
        let raw_model = model.raw()?;
        let fourier = params.fourier.raw()?;
        // SAFETY: the init function of this very struct.
        let mut raw_params =
            unsafe { sys::fkv_calibrator_params::defaults(sys::fkv_calibrator_params_init) };
        raw_params.criterion = params.criterion.to_raw();
        raw_params.fourier = &fourier;
        // SAFETY: a living handle; the structs and what they point to live through the call.
        let raw = context.create(|out| unsafe {
            sys::fkv_calibrator_create(context.as_raw(), raw_model.as_ptr(), &raw_params, out)
        })?;
        // Creation has checked both factors: at most 1024 and 256.
        let channels = model.n_kv_heads * model.head_dim;
        Ok(Calibrator {
            context: context.clone(),
            raw,
            channels,
        })
    }

    /// Adds one prompt's keys and values of one layer, whole: `[tokens, Hk, D]`, before RoPE, positions
    /// from 0 on. `q`, `[tokens, Hq, D]` before RoPE, is given for all prompts of a layer or for none. A
    /// prompt without a middle is Invalid. Errors: Invalid, NonFinite, NoMemory, Limit.
    pub fn observe(
        &mut self,
        layer: usize,
        k: &TensorRef<'_>,
        v: &TensorRef<'_>,
        q: Option<&TensorRef<'_>>,
    ) -> Result<()> {
        let layer = int32("layer", layer)?;
        let q = q.map_or(std::ptr::null(), |q| q.as_raw() as *const _);
        // SAFETY: a living handle; each tensor describes memory that is borrowed through the call.
        self.context.check(unsafe {
            sys::fkv_calibrator_observe(self.as_raw(), layer, k.as_raw(), v.as_raw(), q)
        })
    }

    /// The mean error of each channel of a layer's K or V under the criterion, `[Hk, D]`.
    /// Errors: Invalid, State (the layer was not observed).
    pub fn errors(&self, layer: usize, part: Part) -> Result<Vec<f64>> {
        let layer = int32("layer", layer)?;
        let mut errors = vec![0f64; self.channels];
        // SAFETY: a living handle, and a buffer of the stated number of doubles. No other thread is
        // using the calibrator: it is not Sync.
        self.context.check(unsafe {
            sys::fkv_calibrator_errors(
                self.as_raw(),
                layer,
                part.to_raw(),
                errors.as_mut_ptr(),
                errors.len(),
            )
        })?;
        Ok(errors)
    }

    /// A profile that compresses, in each layer, the given share of the Hk * D channels: those of least
    /// error. The shares are in [0, 1], one for each layer. Errors: Invalid, State (a layer was never
    /// observed), NoMemory.
    pub fn solve(&self, k_fraction: &[f64], v_fraction: &[f64]) -> Result<Profile> {
        if k_fraction.len() != v_fraction.len() || k_fraction.is_empty() {
            return Err(crate::Error::invalid(format!(
                "{} shares of K and {} of V: one for each layer expected",
                k_fraction.len(),
                v_fraction.len()
            )));
        }
        self.solve_raw(k_fraction.as_ptr(), v_fraction.as_ptr(), k_fraction.len())
    }

    /// [`solve`](Self::solve) with the published shares by depth: the first 4/28 of the layers K .90 /
    /// V .95, the last 8/28 K .50 / V .70, the others .80 / .80.
    pub fn solve_published_shares(&self) -> Result<Profile> {
        self.solve_raw(std::ptr::null(), std::ptr::null(), 0)
    }

    fn solve_raw(&self, k: *const f64, v: *const f64, shares: usize) -> Result<Profile> {
        // SAFETY: a living handle; both callers pass `shares` doubles at each pointer, or NULL and 0.
        Profile::create(&self.context, |out| unsafe {
            sys::fkv_calibrator_solve(self.as_raw(), k, v, shares, out)
        })
    }

    /// The C handle, still owned by this calibrator.
    pub fn as_raw(&self) -> *mut sys::fkv_calibrator {
        self.raw.as_ptr()
    }
}

impl fmt::Debug for Calibrator {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Calibrator").finish_non_exhaustive()
    }
}
