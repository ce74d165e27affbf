// SPDX-License-Identifier: Apache-2.0
use crate::convert::{c_string, count, int32, int64, Struct};
use crate::{sys, Dtype, Outgrow, Restoration, Result, RopeLayout};
use std::ffi::CString;

/// Geometry of a model.
///
/// ```
/// use fkv::{ModelParams, RopeLayout};
/// let mut model = ModelParams::new(32, 32, 8, 128);
/// model.rope_layout = RopeLayout::HalfSplit;
/// model.inv_freq = (0..64).map(|j| 500000f64.powf(-j as f64 / 64.0)).collect();
/// ```
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct ModelParams {
    /// Number of layers. 1..1024.
    pub n_layers: usize,
    /// Hq; a multiple of `n_kv_heads`. 1..1024.
    pub n_q_heads: usize,
    /// Hk.
    pub n_kv_heads: usize,
    /// D; a multiple of 8 up to [`MAX_HEAD_DIM`](crate::MAX_HEAD_DIM).
    pub head_dim: usize,
    /// Which channels form a RoPE pair.
    pub rope_layout: RopeLayout,
    /// Rotated channels, the first of each head. 0: all, or none without RoPE.
    pub rope_dim: usize,
    /// Angle per position of each pair, in radians; `rope_dim / 2` of them.
    pub inv_freq: Vec<f64>,
    /// Factor on cos and sin of q and k. 0: 1.
    pub rope_scaling: f64,
    /// Factor on q . k before softmax. 0: 1 / sqrt(D).
    pub softmax_scale: f64,
    /// Name for people and for matching, at most 255 bytes.
    pub model_id: Option<String>,
}

impl ModelParams {
    /// A model without RoPE; set the other fields as needed.
    pub fn new(n_layers: usize, n_q_heads: usize, n_kv_heads: usize, head_dim: usize) -> Self {
        // SAFETY: the init function of this very struct.
        let raw = unsafe { sys::fkv_model_params::defaults(sys::fkv_model_params_init) };
        ModelParams {
            n_layers,
            n_q_heads,
            n_kv_heads,
            head_dim,
            rope_layout: RopeLayout::from_raw(raw.rope_layout),
            rope_dim: count(raw.rope_dim.into()),
            inv_freq: Vec::new(),
            rope_scaling: raw.rope_scaling,
            softmax_scale: raw.softmax_scale,
            model_id: None,
        }
    }

    /// The C struct, while what it points to is borrowed.
    pub(crate) fn raw(&self) -> Result<RawModel<'_>> {
        let id = match &self.model_id {
            Some(id) => Some(c_string("model_id", id.as_str())?),
            None => None,
        };
        // SAFETY: the init function of this very struct.
        let mut raw = unsafe { sys::fkv_model_params::defaults(sys::fkv_model_params_init) };
        raw.n_layers = int32("n_layers", self.n_layers)?;
        raw.n_q_heads = int32("n_q_heads", self.n_q_heads)?;
        raw.n_kv_heads = int32("n_kv_heads", self.n_kv_heads)?;
        raw.head_dim = int32("head_dim", self.head_dim)?;
        raw.rope_layout = self.rope_layout.to_raw();
        raw.rope_dim = int32("rope_dim", self.rope_dim)?;
        raw.inv_freq_count = int32("inv_freq", self.inv_freq.len())?;
        if !self.inv_freq.is_empty() {
            raw.inv_freq = self.inv_freq.as_ptr();
        }
        raw.rope_scaling = self.rope_scaling;
        raw.softmax_scale = self.softmax_scale;
        raw.model_id = id.as_ref().map_or(std::ptr::null(), |id| id.as_ptr());
        Ok(RawModel {
            raw,
            _model: self,
            _id: id,
        })
    }
}

/// Keeps what its pointers point to.
pub(crate) struct RawModel<'a> {
    raw: sys::fkv_model_params,
    _model: &'a ModelParams,
    _id: Option<CString>,
}

impl RawModel<'_> {
    pub(crate) fn as_ptr(&self) -> *const sys::fkv_model_params {
        &self.raw
    }
}

/// The Fourier coding. A sequence is `[sinks | middle | local tail]`; in the middle each compressed
/// channel is held as `bins` complex coefficients of its time series, the other channels exactly.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct FourierParams {
    /// Type of exact tokens and kept channels. Default F16.
    pub storage_dtype: Dtype,
    /// Type of the coefficients: F16 or F32. Default F16, which refuses values beyond its range.
    pub coefficient_dtype: Dtype,
    /// Complex bins. 1..65536; at most period / 2 + 1 are used. Default 512.
    pub bins: usize,
    /// Sink tokens, exact. 0..[`MAX_SINK`](crate::MAX_SINK). Default 4.
    pub n_sink: usize,
    /// Newest tokens that stay exact; up to 63 more do, between two codings. Default 1024.
    pub n_local: usize,
    /// How time series come back from their coefficients.
    pub restoration: Restoration,
    /// What happens when the middle reaches its period.
    pub outgrow: Outgrow,
    /// Period in tokens for sequences that do not state their own; at least 64. Default 32768.
    pub period: usize,
    /// A middle shorter than this stays exact. 0: 2 * bins.
    pub min_middle: usize,
}

impl Default for FourierParams {
    fn default() -> Self {
        // SAFETY: the init function of this very struct.
        let raw = unsafe { sys::fkv_fourier_params::defaults(sys::fkv_fourier_params_init) };
        FourierParams {
            storage_dtype: Dtype::from_raw(raw.storage_dtype),
            coefficient_dtype: Dtype::from_raw(raw.coefficient_dtype),
            bins: count(raw.bins.into()),
            n_sink: count(raw.n_sink.into()),
            n_local: count(raw.n_local.into()),
            restoration: Restoration::from_raw(raw.restoration),
            outgrow: Outgrow::from_raw(raw.outgrow),
            period: count(raw.period),
            min_middle: count(raw.min_middle),
        }
    }
}

impl FourierParams {
    pub(crate) fn raw(&self) -> Result<sys::fkv_fourier_params> {
        // SAFETY: the init function of this very struct.
        let mut raw = unsafe { sys::fkv_fourier_params::defaults(sys::fkv_fourier_params_init) };
        raw.storage_dtype = self.storage_dtype.to_raw();
        raw.coefficient_dtype = self.coefficient_dtype.to_raw();
        raw.bins = int32("bins", self.bins)?;
        raw.n_sink = int32("n_sink", self.n_sink)?;
        raw.n_local = int32("n_local", self.n_local)?;
        raw.restoration = self.restoration.to_raw();
        raw.outgrow = self.outgrow.to_raw();
        raw.period = int64("period", self.period)?;
        raw.min_middle = int64("min_middle", self.min_middle)?;
        Ok(raw)
    }
}
