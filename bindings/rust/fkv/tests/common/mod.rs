// SPDX-License-Identifier: Apache-2.0
//! What several tests need: numbers, a model, and attention written down plainly.
#![allow(dead_code)] // no test uses all of it
use fkv::*;

/// A small generator of numbers in [-1, 1).
pub struct Numbers(u64);

impl Numbers {
    pub fn new(seed: u64) -> Self {
        Numbers(seed.wrapping_mul(2).wrapping_add(1))
    }

    pub fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6364136223846793005)
            .wrapping_add(1442695040888963407);
        ((self.0 >> 40) as f32) / (1u64 << 23) as f32 - 1.0
    }

    pub fn take(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.next()).collect()
    }
}

pub fn inv_freq(dim: usize) -> Vec<f64> {
    (0..dim / 2)
        .map(|j| 10000f64.powf(-2.0 * j as f64 / dim as f64))
        .collect()
}

/// A context that makes few threads: tests run beside one another.
pub fn context() -> Context {
    let mut params = ContextParams::default();
    params.threads = 2;
    Context::with_params(&params).unwrap()
}

/// A cache with one plan.
pub struct Setup {
    pub context: Context,
    pub cache: Cache,
    pub plan: Plan,
}

pub fn setup(model: &ModelParams, dtype: Dtype) -> Setup {
    let context = context();
    let profile = Profile::exact(&context, model, dtype).unwrap();
    let cache = Cache::new(&context, &profile).unwrap();
    let plan = Plan::new(&cache).unwrap();
    Setup {
        context,
        cache,
        plan,
    }
}

/// Rotates [tokens, heads, dim] in halves; `position` gives each token's.
pub fn rope(x: &[f32], heads: usize, dim: usize, position: impl Fn(usize) -> f64) -> Vec<f64> {
    let freq = inv_freq(dim);
    let mut out = vec![0f64; x.len()];
    for (row, values) in x.chunks(dim).enumerate() {
        let at = position(row / heads);
        for j in 0..dim / 2 {
            let (a, b) = (f64::from(values[j]), f64::from(values[j + dim / 2]));
            let (sin, cos) = (at * freq[j]).sin_cos();
            out[row * dim + j] = a * cos - b * sin;
            out[row * dim + j + dim / 2] = a * sin + b * cos;
        }
    }
    out
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|&x| x.into()).collect()
}

pub struct Shape {
    pub q_heads: usize,
    pub kv_heads: usize,
    pub dim: usize,
}

/// Causal attention of the last tokens of a sequence: q [new, Hq, D] sees k and v [all, Hk, D] up to its
/// own token. Returns out and lse.
pub fn attention(shape: &Shape, q: &[f64], k: &[f64], v: &[f64]) -> (Vec<f64>, Vec<f64>) {
    let (hq, hk, d) = (shape.q_heads, shape.kv_heads, shape.dim);
    let (new, all) = (q.len() / (hq * d), k.len() / (hk * d));
    let (mut out, mut lse) = (vec![0f64; q.len()], vec![0f64; new * hq]);
    for token in 0..new {
        for head in 0..hq {
            let row = token * hq + head;
            let query = &q[row * d..(row + 1) * d];
            let at = |x: &[f64], t: usize, j: usize| x[(t * hk + head / (hq / hk)) * d + j];
            let weights: Vec<f64> = (0..all - new + token + 1)
                .map(|t| {
                    let dot: f64 = (0..d).map(|j| query[j] * at(k, t, j)).sum();
                    (dot / (d as f64).sqrt()).exp()
                })
                .collect();
            let total: f64 = weights.iter().sum();
            lse[row] = total.ln();
            for j in 0..d {
                let sum: f64 = weights
                    .iter()
                    .enumerate()
                    .map(|(t, w)| w * at(v, t, j))
                    .sum();
                out[row * d + j] = sum / total;
            }
        }
    }
    (out, lse)
}

#[track_caller]
pub fn assert_close(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
        assert!(
            (f64::from(g) - e).abs() <= tolerance,
            "[{i}]: {g}, expected {e}"
        );
    }
}

/// The error of a call that must fail with this status and a text that contains `part`.
#[track_caller]
pub fn fails<T: std::fmt::Debug>(result: Result<T>, status: Status, part: &str) {
    let error = result.expect_err("must fail");
    assert_eq!(error.status(), status, "{error}");
    assert!(error.message().contains(part), "{error}");
}
