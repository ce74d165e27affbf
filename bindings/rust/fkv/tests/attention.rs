// SPDX-License-Identifier: Apache-2.0
//! Attention on exact caches, against the plain formula in double precision.
mod common;
use common::*;
use fkv::*;

/// Prefill and decode of two sequences of awkward lengths, one of them idle in the middle.
fn ragged(shape: &Shape, rope_layout: RopeLayout) {
    let (hq, hk, d) = (shape.q_heads, shape.kv_heads, shape.dim);
    let mut model = ModelParams::new(1, hq, hk, d);
    model.rope_layout = rope_layout;
    if rope_layout != RopeLayout::None {
        model.inv_freq = inv_freq(d);
    }
    let mut s = setup(&model, Dtype::F32);
    let sequences = [
        s.cache.create_sequence().unwrap(),
        s.cache.create_sequence().unwrap(),
    ];
    let mut numbers = Numbers::new(7);
    let mut held = [(Vec::new(), Vec::new()), (Vec::new(), Vec::new())];
    for step in [[1usize, 131], [0, 1], [77, 0], [1, 1], [0, 0]] {
        let tokens = step[0] + step[1];
        let (q, k) = (numbers.take(tokens * hq * d), numbers.take(tokens * hk * d));
        let v = numbers.take(tokens * hk * d);
        let (mut out, mut lse) = (vec![9f32; tokens * hq * d], vec![9f32; tokens * hq]);
        let mut batch = Batch::new();
        batch
            .push(&sequences[0], step[0])
            .push(&sequences[1], step[1]);
        s.plan.update(&s.cache, &batch).unwrap();
        s.plan
            .append_attend(
                &mut s.cache,
                0,
                &TensorRef::new(&q, &[tokens, hq, d]).unwrap(),
                &TensorRef::new(&k, &[tokens, hk, d]).unwrap(),
                &TensorRef::new(&v, &[tokens, hk, d]).unwrap(),
                &mut TensorMut::new(&mut out, &[tokens, hq, d]).unwrap(),
                Some(&mut TensorMut::new(&mut lse, &[tokens, hq]).unwrap()),
            )
            .unwrap();
        let mut first = 0;
        for (i, &n) in step.iter().enumerate() {
            let rows =
                |x: &[f32], heads: usize| x[first * heads * d..(first + n) * heads * d].to_vec();
            let start = held[i].0.len() / (hk * d);
            let rotated = |x: &[f32], heads: usize| match rope_layout {
                RopeLayout::None => wide(x),
                _ => rope(x, heads, d, |t| (start + t) as f64),
            };
            held[i].0.extend(rotated(&rows(&k, hk), hk));
            held[i].1.extend(wide(&rows(&v, hk)));
            let query = rotated(&rows(&q, hq), hq);
            let (expected, expected_lse) = attention(shape, &query, &held[i].0, &held[i].1);
            assert_close(&rows(&out, hq), &expected, 2e-5);
            assert_close(&lse[first * hq..(first + n) * hq], &expected_lse, 2e-5);
            assert_eq!(
                s.cache.sequence_length(&sequences[i]).unwrap(),
                held[i].1.len() / (hk * d)
            );
            first += n;
        }
    }
    // What is held is what was given: keys after RoPE, values to the bit.
    let tokens = s.cache.sequence_length(&sequences[1]).unwrap();
    let (mut k, mut v) = (vec![0f32; tokens * hk * d], vec![0f32; tokens * hk * d]);
    s.cache
        .read(
            &sequences[1],
            0,
            0..tokens,
            Some(&mut TensorMut::new(&mut k, &[tokens, hk, d]).unwrap()),
            Some(&mut TensorMut::new(&mut v, &[tokens, hk, d]).unwrap()),
        )
        .unwrap();
    assert_close(&k, &held[1].0, 2e-6);
    assert_eq!(wide(&v), held[1].1);
}

#[test]
fn one_head_without_rope() {
    ragged(
        &Shape {
            q_heads: 1,
            kv_heads: 1,
            dim: 8,
        },
        RopeLayout::None,
    );
}

#[test]
fn grouped_heads_of_awkward_size() {
    ragged(
        &Shape {
            q_heads: 6,
            kv_heads: 2,
            dim: 72,
        },
        RopeLayout::HalfSplit,
    );
}

#[test]
fn many_query_heads_on_one() {
    ragged(
        &Shape {
            q_heads: 7,
            kv_heads: 1,
            dim: 40,
        },
        RopeLayout::HalfSplit,
    );
}

/// The same numbers given as f32, f16 and bf16 give the same output: they are chosen to be exact.
#[test]
fn all_element_types() {
    fn run<T: Element>(convert: impl Fn(f32) -> T, back: impl Fn(T) -> f32) -> Vec<f32> {
        let mut s = setup(&ModelParams::new(1, 2, 1, 16), Dtype::F32);
        let sequence = s.cache.create_sequence().unwrap();
        let mut batch = Batch::new();
        batch.push(&sequence, 5);
        s.plan.update(&s.cache, &batch).unwrap();
        let mut numbers = Numbers::new(3);
        let mut coarse = |n: usize| -> Vec<T> {
            (0..n)
                .map(|_| convert((numbers.next() * 64.0).round() / 64.0))
                .collect()
        };
        let (q, k, v) = (coarse(5 * 2 * 16), coarse(5 * 16), coarse(5 * 16));
        let mut out = vec![convert(0.0); 5 * 2 * 16];
        let q = TensorRef::new(&q, &[5, 2, 16]).unwrap();
        assert_eq!(q.dtype(), T::DTYPE);
        s.plan
            .append_attend(
                &mut s.cache,
                0,
                &q,
                &TensorRef::new(&k, &[5, 1, 16]).unwrap(),
                &TensorRef::new(&v, &[5, 1, 16]).unwrap(),
                &mut TensorMut::new(&mut out, &[5, 2, 16]).unwrap(),
                None,
            )
            .unwrap();
        out.into_iter().map(back).collect()
    }
    let exact = run(|x| x, |x| x);
    let half = run(F16::from_f32, F16::to_f32);
    let brain = run(Bf16::from_f32, Bf16::to_f32);
    // The output is rounded once, to the output's type.
    for ((&e, &h), &b) in exact.iter().zip(&half).zip(&brain) {
        assert_eq!(F16::from_f32(e).to_f32(), h);
        assert_eq!(Bf16::from_f32(e).to_f32(), b);
    }
}

/// q, k and v as slices of one fused array, out in [heads, tokens, D].
#[test]
fn strided_views() {
    const T: usize = 9;
    const D: usize = 24;
    let run = |strided: bool| {
        let mut s = setup(&ModelParams::new(1, 2, 1, D), Dtype::F32);
        let sequence = s.cache.create_sequence().unwrap();
        let mut batch = Batch::new();
        batch.push(&sequence, T);
        s.plan.update(&s.cache, &batch).unwrap();
        let fused = Numbers::new(1).take(T * 4 * D);
        let mut out = vec![0f32; T * 2 * D];
        if strided {
            let row = 4 * D;
            let q = TensorRef::with_strides(&fused, &[T, 2, D], &[row, D, 1]).unwrap();
            let k = TensorRef::with_strides(&fused[2 * D..], &[T, 1, D], &[row, D, 1]).unwrap();
            let v = TensorRef::with_strides(&fused[3 * D..], &[T, 1, D], &[row, D, 1]).unwrap();
            let mut by_head = vec![0f32; T * 2 * D];
            let mut view =
                TensorMut::with_strides(&mut by_head, &[T, 2, D], &[D, T * D, 1]).unwrap();
            s.plan
                .append_attend(&mut s.cache, 0, &q, &k, &v, &mut view, None)
                .unwrap();
            for (i, value) in out.iter_mut().enumerate() {
                let (token, head, j) = (i / (2 * D), i / D % 2, i % D);
                *value = by_head[head * T * D + token * D + j];
            }
        } else {
            let part = |first: usize, heads: usize| -> Vec<f32> {
                fused
                    .chunks(4 * D)
                    .flat_map(|row| &row[first * D..(first + heads) * D])
                    .copied()
                    .collect()
            };
            let (q, k, v) = (part(0, 2), part(2, 1), part(3, 1));
            s.plan
                .append_attend(
                    &mut s.cache,
                    0,
                    &TensorRef::new(&q, &[T, 2, D]).unwrap(),
                    &TensorRef::new(&k, &[T, 1, D]).unwrap(),
                    &TensorRef::new(&v, &[T, 1, D]).unwrap(),
                    &mut TensorMut::new(&mut out, &[T, 2, D]).unwrap(),
                    None,
                )
                .unwrap();
        }
        out
    };
    assert_eq!(run(true), run(false));
}

/// Positions given by hand: those that a token would have anyway change nothing, others do.
#[test]
fn positions() {
    const D: usize = 16;
    let run = |positions: Option<&[i64]>| {
        let mut model = ModelParams::new(1, 1, 1, D);
        model.rope_layout = RopeLayout::HalfSplit;
        model.inv_freq = inv_freq(D);
        let mut s = setup(&model, Dtype::F32);
        let sequence = s.cache.create_sequence().unwrap();
        let mut batch = Batch::new();
        batch.push(&sequence, 3);
        if let Some(positions) = positions {
            batch.set_positions(positions);
        }
        s.plan.update(&s.cache, &batch)?;
        let (x, mut k) = (Numbers::new(5).take(3 * D), vec![0f32; 3 * D]);
        let tensor = TensorRef::new(&x, &[3, 1, D])?;
        s.plan.append(&mut s.cache, 0, &tensor, &tensor)?;
        s.cache.read(
            &sequence,
            0,
            0..3,
            Some(&mut TensorMut::new(&mut k, &[3, 1, D])?),
            None,
        )?;
        Ok((x, k))
    };
    let (x, plain) = run(None).unwrap();
    assert_eq!(run(Some(&[0, 1, 2])).unwrap().1, plain);
    let at = [5, 900, 2];
    let expected = rope(&x, 1, D, |t| at[t] as f64);
    assert_close(&run(Some(&at)).unwrap().1, &expected, 2e-6);
    fails(run(Some(&[0, 1])), Status::Invalid, "positions");
    fails(run(Some(&[0, 1, -1])), Status::Invalid, "positions");
}

/// Attention over the earlier steps, merged with attention over the new tokens alone, is the whole.
#[test]
fn merge_of_old_and_new() {
    const D: usize = 32;
    let shape = Shape {
        q_heads: 2,
        kv_heads: 1,
        dim: D,
    };
    let mut s = setup(&ModelParams::new(1, 2, 1, D), Dtype::F32);
    let sequence = s.cache.create_sequence().unwrap();
    let mut numbers = Numbers::new(11);
    let (k, v) = (numbers.take(50 * D), numbers.take(50 * D));
    let q = numbers.take(2 * D);
    let tensor = |x, tokens, heads| TensorRef::new(x, &[tokens, heads, D]).unwrap();

    let mut batch = Batch::new();
    batch.push(&sequence, 49);
    s.plan.update(&s.cache, &batch).unwrap();
    let (old_k, old_v) = (tensor(&k[..49 * D], 49, 1), tensor(&v[..49 * D], 49, 1));
    s.plan.append(&mut s.cache, 0, &old_k, &old_v).unwrap();

    let mut batch = Batch::new();
    batch.push(&sequence, 1);
    s.plan.update(&s.cache, &batch).unwrap();
    let (mut out, mut lse) = (vec![0f32; 2 * D], vec![0f32; 2]);
    let mut out_view = TensorMut::new(&mut out, &[1, 2, D]).unwrap();
    let mut lse_view = TensorMut::new(&mut lse, &[1, 2]).unwrap();
    s.plan
        .attend(
            &s.cache,
            0,
            &tensor(&q, 1, 2),
            &mut out_view,
            Some(&mut lse_view),
        )
        .unwrap();
    // The new token alone: its value, and the score as lse.
    let (new_out, new_lse) = attention(&shape, &wide(&q), &wide(&k[49 * D..]), &wide(&v[49 * D..]));
    let narrow = |x: Vec<f64>| -> Vec<f32> { x.into_iter().map(|x| x as f32).collect() };
    let (new_out, new_lse) = (narrow(new_out), narrow(new_lse));
    s.context
        .merge(
            &mut out_view,
            &mut lse_view,
            &tensor(&new_out, 1, 2),
            &TensorRef::new(&new_lse, &[1, 2]).unwrap(),
        )
        .unwrap();
    let (expected, expected_lse) = attention(&shape, &wide(&q), &wide(&k), &wide(&v));
    assert_close(&out, &expected, 2e-6);
    assert_close(&lse, &expected_lse, 2e-6);
}

#[test]
fn a_token_that_sees_nothing() {
    let mut s = setup(&ModelParams::new(1, 1, 1, 8), Dtype::F32);
    let sequence = s.cache.create_sequence().unwrap();
    let mut batch = Batch::new();
    batch.push(&sequence, 1);
    s.plan.update(&s.cache, &batch).unwrap();
    let (mut out, mut lse) = ([5f32; 8], [5f32]);
    s.plan
        .attend(
            &s.cache,
            0,
            &TensorRef::new(&[1f32; 8], &[1, 1, 8]).unwrap(),
            &mut TensorMut::new(&mut out, &[1, 1, 8]).unwrap(),
            Some(&mut TensorMut::new(&mut lse, &[1, 1]).unwrap()),
        )
        .unwrap();
    assert_eq!(out, [0f32; 8]);
    assert_eq!(lse, [f32::NEG_INFINITY]);
}

#[test]
fn an_empty_step_is_a_step() {
    let mut s = setup(&ModelParams::new(1, 1, 1, 8), Dtype::F16);
    s.plan.update(&s.cache, &Batch::new()).unwrap();
    let none: [f32; 0] = [];
    let nothing = TensorRef::new(&none, &[0, 1, 8]).unwrap();
    s.plan.append(&mut s.cache, 0, &nothing, &nothing).unwrap();
}

#[test]
fn every_cpu_level_there_is() {
    let best = context().info().unwrap().best_cpu_level;
    let levels = [CpuLevel::Reference, CpuLevel::Avx2, CpuLevel::Avx512];
    let mut tried = 0;
    for level in levels {
        let mut params = ContextParams::default();
        params.cpu_level = level;
        let made = Context::with_params(&params);
        if level.to_raw() > best.to_raw() {
            fails(made, Status::Unsupported, "cpu_level");
            continue;
        }
        let context = made.unwrap();
        assert_eq!(context.info().unwrap().cpu_level, level);
        let profile = Profile::exact(&context, &ModelParams::new(1, 1, 1, 8), Dtype::F32).unwrap();
        let mut cache = Cache::new(&context, &profile).unwrap();
        let sequence = cache.create_sequence().unwrap();
        let mut batch = Batch::new();
        batch.push(&sequence, 1);
        let mut plan = Plan::new(&cache).unwrap();
        plan.update(&cache, &batch).unwrap();
        let (x, mut out) = ([0.25f32; 8], [0f32; 8]);
        let t = TensorRef::new(&x, &[1, 1, 8]).unwrap();
        let mut view = TensorMut::new(&mut out, &[1, 1, 8]).unwrap();
        plan.append_attend(&mut cache, 0, &t, &t, &t, &mut view, None)
            .unwrap();
        assert_eq!(out, x);
        tried += 1;
    }
    assert!(tried > 0);
}
