// SPDX-License-Identifier: Apache-2.0
use crate::convert::{int32, Struct};
use crate::{sys, Cache, Result};

/// What coding has cost attention, measured on sealed blocks: see [`Cache::meter`]. A sample is one query
/// head and one block: o and l are output and log-sum-exp of attention to the block alone, exact; o' and l'
/// the same from the sealed block; O the query's whole output.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct Fidelity {
    /// Of blocks that are chosen, as set.
    pub fraction: f64,
    /// Blocks measured; those of each layer count.
    pub blocks: u64,
    /// Blocks chosen but not measured: sealed without queries, or with selection.
    pub blocks_missed: u64,
    /// Samples: query heads of measured blocks.
    pub samples: u64,
    /// sqrt(sum |o' - o|^2 / sum |o|^2): the relative error of the block's output.
    pub block_error: f64,
    /// The largest |o' - o| / |o|.
    pub block_error_max: f64,
    /// Mean of l' - l: above 0, coded tokens draw too much attention.
    pub lse_bias: f64,
    /// Root of the mean of (l' - l)^2.
    pub lse_error: f64,
    /// The largest |l' - l|.
    pub lse_error_max: f64,
    /// Mean share of all attention that the block has.
    pub weight: f64,
    /// sqrt(sum |O' - O|^2 / sum |O|^2), O' being O with this one block coded.
    pub output_error: f64,
    /// The largest |O' - O| / |O|.
    pub output_error_max: f64,
}

impl Fidelity {
    fn from_raw(raw: &sys::fkv_fidelity) -> Self {
        Fidelity {
            fraction: raw.fraction,
            blocks: raw.blocks,
            blocks_missed: raw.blocks_missed,
            samples: raw.samples,
            block_error: raw.block_error,
            block_error_max: raw.block_error_max,
            lse_bias: raw.lse_bias,
            lse_error: raw.lse_error,
            lse_error_max: raw.lse_error_max,
            weight: raw.weight,
            output_error: raw.output_error,
            output_error_max: raw.output_error_max,
        }
    }
}

impl Cache {
    /// Starts the fidelity meter of a cache with a calibrated profile: from each plan's next update on this
    /// `fraction` of the blocks of every layer is measured as they are sealed. Figures begin afresh; 0 ends
    /// the meter. Outputs do not change.
    /// Errors: Invalid (not in 0..=1), Unsupported (other profiles, CUDA), NoMemory, Limit.
    pub fn meter(&mut self, fraction: f64) -> Result<()> {
        // SAFETY: a living handle.
        let status = unsafe { sys::fkv_cache_meter(self.as_raw(), fraction) };
        self.context().check(status)
    }

    /// What the meter has found in a layer, or (`None`) in all. Errors: Invalid (layer), State (it is off).
    pub fn fidelity(&self, layer: Option<usize>) -> Result<Fidelity> {
        let layer = match layer {
            Some(layer) => int32("layer", layer)?,
            None => sys::FKV_ALL_LAYERS,
        };
        let mut raw = sys::fkv_fidelity::empty();
        // SAFETY: a living handle, and a struct that states its size.
        let status = unsafe { sys::fkv_cache_fidelity(self.as_raw(), layer, &mut raw) };
        self.context().check(status)?;
        Ok(Fidelity::from_raw(&raw))
    }
}
