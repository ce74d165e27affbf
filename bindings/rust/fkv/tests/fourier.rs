// SPDX-License-Identifier: Apache-2.0
//! Fourier profiles: made by masks, by calibration, imported, saved; and attention on what they hold.
mod common;
use common::*;
use fkv::*;
use std::path::Path;

const HK: usize = 2;
const HQ: usize = 4;
const D: usize = 16;
const TOKENS: usize = 700;

fn model() -> ModelParams {
    let mut model = ModelParams::new(2, HQ, HK, D);
    model.rope_layout = RopeLayout::HalfSplit;
    model.inv_freq = inv_freq(D);
    model.model_id = Some("example \u{e4}".into());
    model
}

fn coding() -> FourierParams {
    let mut fourier = FourierParams::default();
    fourier.bins = 24;
    fourier.n_sink = 2;
    fourier.n_local = 65;
    fourier.period = 512;
    fourier.coefficient_dtype = Dtype::F32;
    fourier
}

/// Every third channel, and of V every second.
fn masks() -> (Vec<bool>, Vec<bool>) {
    let channels = 2 * HK * D;
    (
        (0..channels).map(|c| c % 3 == 0).collect(),
        (0..channels).map(|c| c % 2 == 0).collect(),
    )
}

fn profile(context: &Context) -> Profile {
    let (k, v) = masks();
    Profile::fourier(context, &model(), &coding(), &k, &v).unwrap()
}

#[test]
fn defaults_are_those_of_the_header() {
    let f = FourierParams::default();
    assert_eq!(
        (f.storage_dtype, f.coefficient_dtype),
        (Dtype::F16, Dtype::F16)
    );
    assert_eq!(
        (f.bins, f.n_sink, f.n_local, f.period, f.min_middle),
        (512, 4, 1024, 32768, 0)
    );
    assert_eq!(
        (f.restoration, f.outgrow),
        (Restoration::LeastSquares, Outgrow::Segment)
    );
    assert_eq!(SequenceParams::default().period, 0);
    assert_eq!(CalibratorParams::default().criterion, Criterion::Residual);
}

#[test]
fn a_profile_says_what_it_was_made_of() {
    let context = context();
    let info = profile(&context).info().unwrap();
    let f = coding();
    assert_eq!(info.coding, Coding::Fourier);
    assert_eq!(
        (
            info.n_layers,
            info.n_q_heads,
            info.n_kv_heads,
            info.head_dim
        ),
        (2, HQ, HK, D)
    );
    assert_eq!(
        (info.rope_layout, info.rope_dim),
        (RopeLayout::HalfSplit, D)
    );
    assert_eq!(
        (info.storage_dtype, info.coefficient_dtype),
        (Dtype::F16, Dtype::F32)
    );
    assert_eq!(
        (info.bins, info.n_sink, info.n_local),
        (f.bins, f.n_sink, f.n_local)
    );
    assert_eq!((info.restoration, info.outgrow), (f.restoration, f.outgrow));
    assert_eq!((info.period, info.min_middle), (f.period, 2 * f.bins));
    let (k, v) = masks();
    let ones = |mask: &[bool]| mask.iter().filter(|&&m| m).count();
    assert_eq!(
        (info.k_fourier_channels, info.v_fourier_channels),
        (ones(&k), ones(&v))
    );
    assert_eq!(info.softmax_scale, 0.25);
    for layer in 0..2 {
        for (part, mask) in [(Part::K, &k), (Part::V, &v)] {
            let expected: Vec<Channel> = mask[layer * HK * D..(layer + 1) * HK * D]
                .iter()
                .map(|&m| if m { Channel::Fourier } else { Channel::Exact })
                .collect();
            assert_eq!(profile(&context).channels(layer, part).unwrap(), expected);
        }
    }
    assert!(format!("{:?}", profile(&context)).contains("bins: 24"));
}

#[test]
fn wrong_masks_and_parameters() {
    let context = context();
    let (k, v) = masks();
    let make =
        |f: &FourierParams, k: &[bool], v: &[bool]| Profile::fourier(&context, &model(), f, k, v);
    fails(
        make(&coding(), &k[1..], &v[1..]),
        Status::Invalid,
        "mask_bytes is 63, expected 64",
    );
    fails(make(&coding(), &k, &v[1..]), Status::Invalid, "v_mask 63");
    let with = |change: fn(&mut FourierParams)| {
        let mut f = coding();
        change(&mut f);
        make(&f, &k, &v)
    };
    fails(with(|f| f.bins = 0), Status::Invalid, "bins");
    fails(
        with(|f| f.bins = 1 << 33),
        Status::Invalid,
        "bins: 8589934592",
    );
    fails(with(|f| f.period = 63), Status::Invalid, "period");
    fails(with(|f| f.n_sink = MAX_SINK + 1), Status::Invalid, "n_sink");
    fails(
        with(|f| f.coefficient_dtype = Dtype::Bf16),
        Status::Invalid,
        "coefficient_dtype",
    );
    assert!(with(|f| f.restoration = Restoration::Unknown(5)).is_err());
}

/// Attention on a coded cache is attention on what the cache says it holds.
#[test]
fn attention_sees_what_is_read_back() {
    let context = context();
    let profile = profile(&context);
    let mut cache = Cache::new(&context, &profile).unwrap();
    let mut params = SequenceParams::default();
    params.period = 600;
    let sequence = cache.create_sequence_with(&params).unwrap();
    let mut plan = Plan::new(&cache).unwrap();
    let mut numbers = Numbers::new(17);
    let (k, v) = (numbers.take(TOKENS * HK * D), numbers.take(TOKENS * HK * D));
    let q = numbers.take(HQ * D);

    let mut batch = Batch::new();
    batch.push(&sequence, TOKENS);
    plan.update(&cache, &batch).unwrap();
    for layer in 0..2 {
        let k = TensorRef::new(&k, &[TOKENS, HK, D]).unwrap();
        let v = TensorRef::new(&v, &[TOKENS, HK, D]).unwrap();
        plan.append(&mut cache, layer, &k, &v).unwrap();
    }
    let stats = cache.sequence_stats(&sequence).unwrap();
    assert_eq!(stats.tokens, TOKENS as u64);
    assert_eq!(stats.tokens_exact + stats.tokens_coded, stats.tokens);
    assert!(stats.tokens_coded > 500, "{stats:?}");
    let parts =
        stats.bytes_exact + stats.bytes_kept + stats.bytes_coefficients + stats.bytes_tables;
    assert_eq!(stats.bytes, parts);
    assert_eq!(stats.dense_bytes, (4 * HK * D * 2 * TOKENS) as u64);
    let all = cache.stats().unwrap();
    assert_eq!(all, profile.estimate(TOKENS, 600).unwrap());
    assert!((all.ratio - all.dense_bytes as f64 / all.bytes as f64).abs() < 1e-12);

    let (mut held_k, mut held_v) = (vec![0f32; k.len()], vec![0f32; v.len()]);
    let mut view_k = TensorMut::new(&mut held_k, &[TOKENS, HK, D]).unwrap();
    let mut view_v = TensorMut::new(&mut held_v, &[TOKENS, HK, D]).unwrap();
    cache
        .read(
            &sequence,
            1,
            0..TOKENS,
            Some(&mut view_k),
            Some(&mut view_v),
        )
        .unwrap();
    // Channel 1 of V is kept: f16. Channel 0 is coded, so that noise comes back as something else.
    for t in 0..TOKENS {
        let at = t * HK * D;
        assert_eq!(held_v[at + 1], F16::from_f32(v[at + 1]).to_f32());
    }
    let middle = 2..TOKENS - 128;
    assert!(
        middle
            .clone()
            .filter(|t| (held_v[t * HK * D] - v[t * HK * D]).abs() > 0.05)
            .count()
            > 99
    );

    let mut batch = Batch::new();
    batch.push(&sequence, 1);
    plan.update(&cache, &batch).unwrap();
    let (mut out, mut lse) = (vec![0f32; HQ * D], vec![0f32; HQ]);
    plan.attend(
        &cache,
        1,
        &TensorRef::new(&q, &[1, HQ, D]).unwrap(),
        &mut TensorMut::new(&mut out, &[1, HQ, D]).unwrap(),
        Some(&mut TensorMut::new(&mut lse, &[1, HQ]).unwrap()),
    )
    .unwrap();
    let query = rope(&q, HQ, D, |_| TOKENS as f64);
    let shape = Shape {
        q_heads: HQ,
        kv_heads: HK,
        dim: D,
    };
    let (k, v) = (wide(&held_k), wide(&held_v));
    // A step that has not been appended sees all that is held.
    let (expected, expected_lse) = attention(&shape, &query, &k, &v);
    assert_close(&out, &expected, 1e-4);
    assert_close(&lse, &expected_lse, 1e-4);

    cache.free_sequence(sequence).unwrap();
    let empty = cache.stats().unwrap();
    assert_eq!((empty.sequences, empty.tokens, empty.ratio), (0, 0, 0.0));
}

#[test]
fn outgrowing_the_period() {
    let context = context();
    let mut f = coding();
    f.outgrow = Outgrow::Error;
    f.period = 128;
    let (k, v) = masks();
    let profile = Profile::fourier(&context, &model(), &f, &k, &v).unwrap();
    let mut cache = Cache::new(&context, &profile).unwrap();
    let sequence = cache.create_sequence().unwrap();
    let mut plan = Plan::new(&cache).unwrap();
    let mut batch = Batch::new();
    batch.push(&sequence, TOKENS);
    let data = vec![0f32; TOKENS * HK * D];
    let t = TensorRef::new(&data, &[TOKENS, HK, D]).unwrap();
    let result = plan
        .update(&cache, &batch)
        .and_then(|_| plan.append(&mut cache, 0, &t, &t));
    fails(result, Status::Limit, "");
    let mut short = SequenceParams::default();
    short.period = 63;
    fails(
        cache.create_sequence_with(&short),
        Status::Invalid,
        "period is 63",
    );
}

#[test]
fn saving_and_loading() {
    let context = context();
    let profile = profile(&context);
    let text = profile.save().unwrap();
    assert!(text.contains("example \u{e4}"));
    let again = Profile::load(&context, &text).unwrap();
    assert_eq!(again.save().unwrap(), text);
    assert_eq!(again.info().unwrap(), profile.info().unwrap());
    // A file name with a space and bytes that are not ASCII.
    let path = Path::new(env!("CARGO_TARGET_TMPDIR")).join("a profile \u{e4}.json");
    profile.save_file(&path).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text);
    assert_eq!(
        Profile::load_file(&context, &path).unwrap().save().unwrap(),
        text
    );
    std::fs::remove_file(&path).unwrap();
}

const PLAIN: &str = r#"{
    "Layer_0": {"self_attn.k_proj": [9, 0, 7, 8], "self_attn.v_proj": [1]},
    "Layer_1": {"self_attn.k_proj": [15], "self_attn.v_proj": []}
}"#;

#[test]
fn published_lists() {
    let context = context();
    let model = ModelParams::new(2, 2, 2, 8);
    let import = |json: &str, fraction| {
        Profile::import_published(&context, &model, &coding(), json, fraction)
    };
    let coded = |profile: &Profile, layer, part| -> Vec<usize> {
        let channels = profile.channels(layer, part).unwrap();
        (0..16)
            .filter(|&c| channels[c] == Channel::Fourier)
            .collect()
    };
    let whole = import(PLAIN, 1.0).unwrap();
    assert_eq!(coded(&whole, 0, Part::K), [0, 7, 8, 9]);
    assert_eq!(coded(&whole, 0, Part::V), [1]);
    assert_eq!(coded(&whole, 1, Part::K), [15]);
    assert_eq!(coded(&whole, 1, Part::V), [0; 0]);
    let half = import(PLAIN, 0.5).unwrap();
    assert_eq!(coded(&half, 0, Part::K), [0, 9]); // the list is by ascending error
    fails(import(PLAIN, 0.0), Status::Invalid, "fraction");
    fails(
        import(&PLAIN.replace("[9, 0", "[9, 9"), 1.0),
        Status::Format,
        "k_proj[1]",
    );
    fails(
        import(&PLAIN.replace("[9, 0", "[16, 0"), 1.0),
        Status::Mismatch,
        "k_proj[0]",
    );
    fails(
        import(&PLAIN.replace("Layer_1", "Layer_2"), 1.0),
        Status::Format,
        "Layer_1: missing",
    );
}

/// Channels 0, 4, 8, ... are slow waves, the others noise.
fn observed(seed: u64) -> Vec<f32> {
    let mut numbers = Numbers::new(seed);
    (0..TOKENS * HK * D)
        .map(|i| {
            let (token, channel) = (i / (HK * D), i % (HK * D));
            let noise = numbers.next();
            if channel % 4 == 0 {
                (token as f32 * std::f32::consts::TAU * 3.0 / 512.0).sin()
            } else {
                noise
            }
        })
        .collect()
}

#[test]
fn calibration_finds_the_slow_channels() {
    let context = context();
    let mut params = CalibratorParams::default();
    params.fourier = coding();
    let mut model = model();
    model.rope_layout = RopeLayout::None;
    model.inv_freq = Vec::new();
    let mut calibrator = Calibrator::new(&context, &model, &params).unwrap();
    fails(calibrator.errors(0, Part::K), Status::State, "");
    let (k, v, q) = (
        observed(1),
        observed(2),
        Numbers::new(3).take(TOKENS * HQ * D),
    );
    let k = TensorRef::new(&k, &[TOKENS, HK, D]).unwrap();
    let v = TensorRef::new(&v, &[TOKENS, HK, D]).unwrap();
    let q = TensorRef::new(&q, &[TOKENS, HQ, D]).unwrap();
    calibrator.observe(0, &k, &v, Some(&q)).unwrap();
    fails(calibrator.observe(0, &k, &v, None), Status::Invalid, "q");
    fails(calibrator.solve(&[0.25; 2], &[0.25; 2]), Status::State, "");
    calibrator.observe(1, &k, &v, None).unwrap();
    fails(
        calibrator.observe(2, &k, &v, None),
        Status::Invalid,
        "layer",
    );
    let short = TensorRef::new(&[0f32; HK * D], &[1, HK, D]).unwrap();
    fails(
        calibrator.observe(1, &short, &short, None),
        Status::Invalid,
        "",
    );

    for part in [Part::K, Part::V] {
        let errors = calibrator.errors(1, part).unwrap();
        assert_eq!(errors.len(), HK * D);
        let slow = (0..HK * D)
            .step_by(4)
            .map(|c| errors[c])
            .fold(0.0, f64::max);
        let noisy = (0..HK * D)
            .filter(|c| c % 4 != 0)
            .map(|c| errors[c])
            .fold(1e9, f64::min);
        assert!(slow * 10.0 < noisy, "{slow} {noisy}");
    }
    let profile = calibrator.solve(&[0.25; 2], &[0.25, 0.0]).unwrap();
    let slow: Vec<Channel> = (0..HK * D)
        .map(|c| {
            if c % 4 == 0 {
                Channel::Fourier
            } else {
                Channel::Exact
            }
        })
        .collect();
    assert_eq!(profile.channels(0, Part::K).unwrap(), slow);
    assert_eq!(profile.channels(0, Part::V).unwrap(), slow);
    assert_eq!(
        profile.channels(1, Part::V).unwrap(),
        vec![Channel::Exact; HK * D]
    );
    assert_eq!(profile.info().unwrap().bins, coding().bins);
    assert!(
        calibrator
            .solve_published_shares()
            .unwrap()
            .info()
            .unwrap()
            .k_fourier_channels
            > 0
    );
    fails(calibrator.solve(&[0.5], &[0.5]), Status::Invalid, "count 2");
    fails(
        calibrator.solve(&[0.5; 2], &[0.5]),
        Status::Invalid,
        "1 of V",
    );
    fails(calibrator.solve(&[], &[]), Status::Invalid, "0 shares");
    fails(
        calibrator.solve(&[0.5, 1.5], &[0.5; 2]),
        Status::Invalid,
        "k_fraction[1]",
    );
    params.criterion = Criterion::Unknown(8);
    fails(
        Calibrator::new(&context, &model, &params),
        Status::Invalid,
        "criterion",
    );
    params.criterion = Criterion::Published;
    Calibrator::new(&context, &model, &params).unwrap();
}
