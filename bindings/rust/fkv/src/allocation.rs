// SPDX-License-Identifier: Apache-2.0
use crate::convert::{count, int64, Struct};
use crate::{sys, Result, Target};

/// How bits are given to channels.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct AllocationParams {
    /// What must be reached. Default Ratio.
    pub target: Target,
    /// The target; above 0. Default 12.
    pub value: f64,
    /// Tokens of a sequence for which ratios hold. Default 8192.
    pub tokens: usize,
    /// Allowed levels: bit b stands for b bits, of 0, 2, 3, 4, 8, 16. Default 0, 2 and 4.
    pub levels: u64,
    /// Factors on the expected losses, `[n_layers, 2]`: of K, of V. Empty: none.
    pub weights: Vec<f64>,
}

impl Default for AllocationParams {
    fn default() -> Self {
        // SAFETY: the init function of this very struct.
        let raw = unsafe { sys::fkv_allocation_params::defaults(sys::fkv_allocation_params_init) };
        AllocationParams {
            target: Target::from_raw(raw.target),
            value: raw.value,
            tokens: count(raw.tokens),
            levels: raw.levels,
            weights: Vec::new(),
        }
    }
}

impl AllocationParams {
    /// The C struct, which points into `self`.
    pub(crate) fn raw(&self) -> Result<sys::fkv_allocation_params> {
        // SAFETY: the init function of this very struct.
        let mut raw =
            unsafe { sys::fkv_allocation_params::defaults(sys::fkv_allocation_params_init) };
        raw.target = self.target.to_raw();
        raw.value = self.value;
        raw.tokens = int64("tokens", self.tokens)?;
        raw.levels = self.levels;
        if !self.weights.is_empty() {
            raw.weights = self.weights.as_ptr();
            raw.weights_count = self.weights.len() as u64;
        }
        Ok(raw)
    }
}

/// What came of an allocation. Losses are in the unit of the gradients: to compare by, not a promise.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct AllocationInfo {
    /// Predicted loss of the profile.
    pub predicted_loss: f64,
    /// Predicted loss with no bits at all.
    pub carrier_loss: f64,
    /// Bits per element of the blocks, scales included.
    pub bits: f64,
    /// Ratio for `tokens` tokens.
    pub ratio: f64,
    /// As asked for.
    pub tokens: usize,
}

impl AllocationInfo {
    pub(crate) fn from_raw(raw: &sys::fkv_allocation_info) -> Self {
        AllocationInfo {
            predicted_loss: raw.predicted_loss,
            carrier_loss: raw.carrier_loss,
            bits: raw.bits,
            ratio: raw.ratio,
            tokens: count(raw.tokens),
        }
    }
}
