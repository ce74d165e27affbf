// SPDX-License-Identifier: Apache-2.0
use crate::convert::{count, Struct};
use crate::sys;
use std::ops::Range;

/// What is seen of a sequence that is longer than the scope; the fields are those of fkv_select_params.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectParams {
    /// First tokens that are always seen.
    pub n_global: i32,
    /// Newest tokens that are always seen; at least 1.
    pub n_local: i32,
    /// Tokens of a span; at least 1.
    pub span: i32,
    /// Votes of a query head, at most [`crate::MAX_TOP_K`]; 0: no spans.
    pub top_k: i32,
    /// Most spans of a view; 0: no spans.
    pub clip: i32,
    /// Most queries that select together.
    pub chunk: i32,
}

impl Default for SelectParams {
    fn default() -> Self {
        // SAFETY: the init function of this very struct.
        let raw = unsafe { sys::fkv_select_params::defaults(sys::fkv_select_params_init) };
        SelectParams {
            n_global: raw.n_global,
            n_local: raw.n_local,
            span: raw.span,
            top_k: raw.top_k,
            clip: raw.clip,
            chunk: raw.chunk,
        }
    }
}

impl SelectParams {
    pub(crate) fn raw(&self) -> sys::fkv_select_params {
        // SAFETY: the init function of this very struct.
        let mut raw = unsafe { sys::fkv_select_params::defaults(sys::fkv_select_params_init) };
        raw.n_global = self.n_global;
        raw.n_local = self.n_local;
        raw.span = self.span;
        raw.top_k = self.top_k;
        raw.clip = self.clip;
        raw.chunk = self.chunk;
        raw
    }
}

/// What the last queries of a sequence saw.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Selection {
    /// Layer of the attention.
    pub layer: usize,
    /// Tokens of the sequence, up to the last query.
    pub tokens: usize,
    /// Tokens of the view.
    pub view: usize,
    /// The middle that was searched; empty if everything was seen.
    pub middle: Range<usize>,
    /// Spans of the middle, ascending.
    pub spans: Vec<Range<usize>>,
}

impl Selection {
    pub(crate) fn from_raw(raw: &sys::fkv_selection, ends: &[i64]) -> Self {
        Selection {
            layer: count(raw.layer.into()),
            tokens: count(raw.tokens),
            view: count(raw.view),
            middle: count(raw.middle_first)..count(raw.middle_end),
            spans: ends
                .chunks_exact(2)
                .map(|span| count(span[0])..count(span[1]))
                .collect(),
        }
    }
}
