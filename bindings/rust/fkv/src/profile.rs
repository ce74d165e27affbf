// SPDX-License-Identifier: Apache-2.0
use crate::convert::{c_string, count, int32, int64, Struct};
use crate::{
    sys, Channel, Coding, Context, Dtype, Error, FourierParams, ModelParams, Outgrow, Part,
    Restoration, Result, RopeLayout, Stats, Status,
};
use std::ffi::CString;
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::ptr::NonNull;

/// What a [`Profile`] says.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub struct ProfileInfo {
    /// Exact or Fourier.
    pub coding: Coding,
    /// Number of layers.
    pub n_layers: usize,
    /// Hq.
    pub n_q_heads: usize,
    /// Hk.
    pub n_kv_heads: usize,
    /// D.
    pub head_dim: usize,
    /// Which channels form a RoPE pair.
    pub rope_layout: RopeLayout,
    /// Rotated channels.
    pub rope_dim: usize,
    /// Type of exact tokens and kept channels.
    pub storage_dtype: Dtype,
    /// Type of the coefficients; None without Fourier coding.
    pub coefficient_dtype: Dtype,
    /// Bins; 0 without Fourier coding.
    pub bins: usize,
    /// Sink tokens.
    pub n_sink: usize,
    /// Local tokens.
    pub n_local: usize,
    /// How time series come back.
    pub restoration: Restoration,
    /// What happens at the period.
    pub outgrow: Outgrow,
    /// Default period in tokens.
    pub period: usize,
    /// Middle below which nothing is coded.
    pub min_middle: usize,
    /// Channels (layer, head, d) of K that are Fourier-coded.
    pub k_fourier_channels: usize,
    /// The same of V.
    pub v_fourier_channels: usize,
    /// Scale on q . k.
    pub softmax_scale: f64,
}

/// A model's geometry and how each channel is held. Immutable.
pub struct Profile {
    context: Context,
    raw: NonNull<sys::fkv_profile>,
}

// SAFETY: the header lets any number of threads share a profile, and lets any of them destroy it; Drop has
// the handle alone.
unsafe impl Send for Profile {}
// SAFETY: as above.
unsafe impl Sync for Profile {}

impl Drop for Profile {
    fn drop(&mut self) {
        // SAFETY: a handle of ours, not yet destroyed, and not in use as it is not borrowed.
        unsafe { sys::fkv_profile_destroy(self.as_raw()) };
    }
}

impl Profile {
    /// Everything exactly, in `storage_dtype`. Errors: Invalid, NoMemory, Limit.
    pub fn exact(context: &Context, model: &ModelParams, storage_dtype: Dtype) -> Result<Self> {
        let model = model.raw()?;
        // SAFETY: a living handle; `model` lives through the call, which copies it.
        Profile::create(context, |out| unsafe {
            sys::fkv_profile_create_exact(
                context.as_raw(),
                model.as_ptr(),
                storage_dtype.to_raw(),
                out,
            )
        })
    }

    /// A Fourier profile. `k_mask` and `v_mask` are `[n_layers, Hk, D]`, true where the channel is
    /// compressed. Keys are coded as attention sees them, that is after RoPE. Errors: Invalid, NoMemory,
    /// Limit.
    pub fn fourier(
        context: &Context,
        model: &ModelParams,
        fourier: &FourierParams,
        k_mask: &[bool],
        v_mask: &[bool],
    ) -> Result<Self> {
        if k_mask.len() != v_mask.len() {
            return Err(Error::invalid(format!(
                "k_mask has {} channels, v_mask {}",
                k_mask.len(),
                v_mask.len()
            )));
        }
        let model = model.raw()?;
        let fourier = fourier.raw()?;
        // SAFETY: a living handle; the structs live through the call, which copies them. A bool is a byte
        // of 0 or 1; both masks have the size that is passed.
        Profile::create(context, |out| unsafe {
            sys::fkv_profile_create_fourier(
                context.as_raw(),
                model.as_ptr(),
                &fourier,
                k_mask.as_ptr().cast(),
                v_mask.as_ptr().cast(),
                k_mask.len(),
                out,
            )
        })
    }

    /// A Fourier profile from channel lists as published with FourierAttention, as JSON text in either
    /// layout. `fraction` in (0, 1] takes only that leading share of each plain list.
    /// Errors: Invalid, NoMemory, Limit, Format and Mismatch with the JSON path.
    pub fn import_published(
        context: &Context,
        model: &ModelParams,
        fourier: &FourierParams,
        json: impl AsRef<[u8]>,
        fraction: f64,
    ) -> Result<Self> {
        let (model, fourier, json) = (model.raw()?, fourier.raw()?, json.as_ref());
        // SAFETY: a living handle; structs and text live through the call, the text with its size.
        Profile::create(context, |out| unsafe {
            sys::fkv_profile_import_published(
                context.as_raw(),
                model.as_ptr(),
                &fourier,
                json.as_ptr().cast(),
                json.len(),
                fraction,
                out,
            )
        })
    }

    /// Reads a profile from its JSON text. Errors: Invalid, NoMemory, Limit, Format and Version with the
    /// JSON path.
    pub fn load(context: &Context, json: impl AsRef<[u8]>) -> Result<Self> {
        let json = json.as_ref();
        // SAFETY: a living handle; the text lives through the call and has the size that is passed.
        Profile::create(context, |out| unsafe {
            sys::fkv_profile_load(context.as_raw(), json.as_ptr().cast(), json.len(), out)
        })
    }

    /// [`load`](Self::load) of a file. Errors: also Io, with the path.
    pub fn load_file(context: &Context, path: impl AsRef<Path>) -> Result<Self> {
        let path = c_path(path.as_ref())?;
        // SAFETY: a living handle; the path ends with a zero and lives through the call.
        Profile::create(context, |out| unsafe {
            sys::fkv_profile_load_file(context.as_raw(), path.as_ptr(), out)
        })
    }

    /// The profile's JSON text. Equal profiles give equal texts. Errors: NoMemory.
    pub fn save(&self) -> Result<String> {
        let mut bytes = 0;
        // SAFETY: a living handle; no buffer of no bytes asks for the size.
        self.context.check(unsafe {
            sys::fkv_profile_save(self.as_raw(), std::ptr::null_mut(), 0, &mut bytes)
        })?;
        let mut text = vec![0u8; bytes];
        // SAFETY: a living handle, and a buffer of the stated size.
        self.context.check(unsafe {
            sys::fkv_profile_save(
                self.as_raw(),
                text.as_mut_ptr().cast(),
                text.len(),
                &mut bytes,
            )
        })?;
        text.truncate(bytes);
        String::from_utf8(text)
            .map_err(|_| Error::new(Status::Format, "the profile's model_id is not UTF-8"))
    }

    /// [`save`](Self::save) to a file, which is replaced whole or not at all. Errors: also Io.
    pub fn save_file(&self, path: impl AsRef<Path>) -> Result<()> {
        let path = c_path(path.as_ref())?;
        // SAFETY: a living handle; the path ends with a zero and lives through the call.
        let status = unsafe { sys::fkv_profile_save_file(self.as_raw(), path.as_ptr()) };
        self.context.check(status)
    }

    /// What the profile says.
    pub fn info(&self) -> Result<ProfileInfo> {
        let mut raw = sys::fkv_profile_info::empty();
        // SAFETY: a living handle, and a struct that states its size.
        let status = unsafe { sys::fkv_profile_query(self.as_raw(), &mut raw) };
        self.context.check(status)?;
        Ok(ProfileInfo {
            coding: Coding::from_raw(raw.coding),
            n_layers: count(raw.n_layers.into()),
            n_q_heads: count(raw.n_q_heads.into()),
            n_kv_heads: count(raw.n_kv_heads.into()),
            head_dim: count(raw.head_dim.into()),
            rope_layout: RopeLayout::from_raw(raw.rope_layout),
            rope_dim: count(raw.rope_dim.into()),
            storage_dtype: Dtype::from_raw(raw.storage_dtype),
            coefficient_dtype: Dtype::from_raw(raw.coefficient_dtype),
            bins: count(raw.bins.into()),
            n_sink: count(raw.n_sink.into()),
            n_local: count(raw.n_local.into()),
            restoration: Restoration::from_raw(raw.restoration),
            outgrow: Outgrow::from_raw(raw.outgrow),
            period: count(raw.period),
            min_middle: count(raw.min_middle),
            k_fourier_channels: count(raw.k_fourier_channels),
            v_fourier_channels: count(raw.v_fourier_channels),
            softmax_scale: raw.softmax_scale,
        })
    }

    /// How each channel of a layer's K or V is held, `[Hk, D]`. Errors: Invalid (layer, part).
    pub fn channels(&self, layer: usize, part: Part) -> Result<Vec<Channel>> {
        let layer = int32("layer", layer)?;
        let info = self.info()?;
        let mut codes = vec![0u8; info.n_kv_heads * info.head_dim];
        // SAFETY: a living handle, and a buffer of the stated size.
        self.context.check(unsafe {
            sys::fkv_profile_channels(
                self.as_raw(),
                layer,
                part.to_raw(),
                codes.as_mut_ptr(),
                codes.len(),
            )
        })?;
        Ok(codes
            .into_iter()
            .map(|code| Channel::from_raw(code.into()))
            .collect())
    }

    /// What [`Cache::stats`](crate::Cache::stats) will say of a cache with one sequence of `tokens` tokens
    /// and the given period (0: the profile's). Errors: Invalid, Limit.
    pub fn estimate(&self, tokens: usize, period: usize) -> Result<Stats> {
        let (tokens, period) = (int64("tokens", tokens)?, int64("period", period)?);
        let mut raw = sys::fkv_stats::empty();
        // SAFETY: a living handle, and a struct that states its size.
        let status = unsafe { sys::fkv_profile_estimate(self.as_raw(), tokens, period, &mut raw) };
        self.context.check(status)?;
        Ok(Stats::from_raw(&raw))
    }

    /// The C handle, still owned by this profile.
    pub fn as_raw(&self) -> *mut sys::fkv_profile {
        self.raw.as_ptr()
    }

    pub(crate) fn create(
        context: &Context,
        function: impl FnOnce(*mut *mut sys::fkv_profile) -> sys::fkv_status,
    ) -> Result<Self> {
        let raw = context.create(function)?;
        Ok(Profile {
            context: context.clone(),
            raw,
        })
    }
}

impl fmt::Debug for Profile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Profile").field(&self.info()).finish()
    }
}

fn c_path(path: &Path) -> Result<CString> {
    c_string("path", path.as_os_str().as_bytes())
}
