// SPDX-License-Identifier: Apache-2.0
//! Wrong calls: the status, the text, and that nothing has changed.
mod common;
use common::*;
use fkv::*;
use std::error::Error as _;

fn small() -> (Setup, Sequence) {
    let mut s = setup(&ModelParams::new(2, 2, 1, 8), Dtype::F16);
    let sequence = s.cache.create_sequence().unwrap();
    (s, sequence)
}

fn step(s: &mut Setup, sequence: &Sequence, n_new: usize) {
    let mut batch = Batch::new();
    batch.push(sequence, n_new);
    s.plan.update(&s.cache, &batch).unwrap();
}

#[test]
fn an_error_has_status_message_and_text() {
    let context = context();
    assert_eq!(context.message(), "");
    let error = Profile::exact(&context, &ModelParams::new(0, 1, 1, 8), Dtype::F16).unwrap_err();
    assert_eq!(error.status(), Status::Invalid);
    assert!(error.message().contains("n_layers"), "{error}");
    assert_eq!(error.message(), context.message());
    assert_eq!(
        error.to_string(),
        format!("FKV_ERR_INVALID: {}", error.message())
    );
    assert!(error.source().is_none());
    let boxed: Box<dyn std::error::Error + Send + Sync> = error.into(); // for `?` in any program
    assert!(boxed.to_string().starts_with("FKV_ERR_INVALID"));
}

#[test]
fn statuses() {
    for raw in -40..10 {
        let status = Status::from_raw(raw);
        assert_eq!(status.to_raw(), raw);
        assert_eq!(
            matches!(status, Status::Unknown(_)),
            !(-15..=0).contains(&raw)
        );
    }
    assert_eq!(Status::from_raw(-99), Status::Unknown(-99));
    assert_eq!(Status::Unknown(-99).to_string(), "unknown status -99");
    assert_eq!(Status::Unknown(-99).name(), "unknown status");
    assert_eq!(Status::NonFinite.to_string(), "FKV_ERR_NONFINITE");
}

#[test]
fn contexts() {
    let with = |change: fn(&mut ContextParams)| {
        let mut params = ContextParams::default();
        change(&mut params);
        Context::with_params(&params)
    };
    fails(
        with(|p| p.backend = Backend::Cuda),
        Status::Unsupported,
        "CUDA",
    );
    fails(
        with(|p| p.backend = Backend::Unknown(9)),
        Status::Unsupported,
        "backend 9",
    );
    fails(
        with(|p| p.cpu_level = CpuLevel::Unknown(77)),
        Status::Unsupported,
        "cpu_level 77",
    );
    fails(with(|p| p.threads = usize::MAX), Status::Invalid, "threads");
    fails(with(|p| p.threads = 1_000_000), Status::Limit, "threads");
    fails(
        with(|p| p.max_tokens = u64::MAX),
        Status::Limit,
        "max_tokens",
    );
    fails(with(|p| p.max_bytes = 16), Status::Limit, "");
    let context = with(|p| p.max_file_bytes = 10).unwrap();
    fails(
        Profile::load(&context, "{\"format\": 1}"),
        Status::Limit,
        "",
    );
    // SAFETY: NULL is refused.
    fails(
        unsafe { Context::from_raw(std::ptr::null_mut()) },
        Status::Invalid,
        "NULL",
    );
}

#[test]
fn models() {
    let context = context();
    let make = |change: fn(&mut ModelParams)| {
        let mut model = ModelParams::new(2, 4, 2, 16);
        change(&mut model);
        Profile::exact(&context, &model, Dtype::F16)
    };
    make(|_| ()).unwrap();
    make(|m| m.model_id = Some("a model".into())).unwrap();
    fails(make(|m| m.n_q_heads = 3), Status::Invalid, "n_q_heads");
    fails(make(|m| m.head_dim = 12), Status::Invalid, "head_dim");
    fails(
        make(|m| m.head_dim = 1 << 40),
        Status::Invalid,
        "head_dim: 1099511627776",
    );
    fails(
        make(|m| m.rope_layout = RopeLayout::HalfSplit),
        Status::Invalid,
        "inv_freq",
    );
    fails(
        make(|m| m.inv_freq = vec![1.0; 3]),
        Status::Invalid,
        "inv_freq",
    );
    fails(
        make(|m| m.model_id = Some("a\0b".into())),
        Status::Invalid,
        "model_id",
    );
    fails(
        make(|m| m.model_id = Some("x".repeat(256))),
        Status::Invalid,
        "longer than 255",
    );
    fails(
        make(|m| m.softmax_scale = f64::NAN),
        Status::Invalid,
        "softmax_scale",
    );
    let model = ModelParams::new(1, 1, 1, 8);
    fails(
        Profile::exact(&context, &model, Dtype::None),
        Status::Invalid,
        "dtype",
    );
}

#[test]
fn tensors() {
    let data = [0f32; 24];
    assert_eq!(
        format!("{:?}", TensorRef::new(&data, &[3, 1, 8]).unwrap()),
        "TensorRef(F32, [3, 1, 8])"
    );
    fails(TensorRef::new(&data, &[]), Status::Invalid, "0 dimensions");
    fails(
        TensorRef::new(&data, &[1, 1, 1, 1, 24]),
        Status::Invalid,
        "5 dimensions",
    );
    fails(
        TensorRef::new(&data, &[2, 1, 8]),
        Status::Invalid,
        "24 elements",
    );
    fails(
        TensorRef::new(&data, &[4, 1, 8]),
        Status::Invalid,
        "24 elements",
    );
    fails(
        TensorRef::new(&data, &[usize::MAX, 1, 1]),
        Status::Invalid,
        "too large",
    );
    fails(
        TensorRef::new(&data, &[1 << 40, 1 << 40, 1]),
        Status::Limit,
        "",
    );
    let strided = |shape: &[usize], strides: &[usize]| {
        TensorRef::with_strides(&data, shape, strides).map(|t| t.shape().to_vec())
    };
    assert_eq!(strided(&[3, 1, 8], &[8, 8, 1]).unwrap(), [3, 1, 8]);
    assert_eq!(strided(&[2, 1, 8], &[16, 8, 1]).unwrap(), [2, 1, 8]);
    assert_eq!(strided(&[0, 1, 8], &[1 << 50, 8, 1]).unwrap(), [0, 1, 8]);
    fails(
        strided(&[2, 1, 8], &[17, 8, 1]),
        Status::Invalid,
        "24 elements",
    );
    fails(strided(&[2, 1, 8], &[8, 1]), Status::Invalid, "2 strides");
    fails(strided(&[], &[]), Status::Invalid, "0 strides");
    fails(
        strided(&[2, 1, 8], &[usize::MAX, 8, 1]),
        Status::Invalid,
        "",
    );
    fails(
        strided(&[3, 1, 8], &[usize::MAX / 8, 8, 1]),
        Status::Invalid,
        "",
    );
    let mut data = data;
    fails(
        TensorMut::new(&mut data, &[5, 5]),
        Status::Invalid,
        "24 elements",
    );
    fails(
        TensorMut::with_strides(&mut data, &[2, 13], &[13, 1]),
        Status::Invalid,
        "24 elements",
    );
    assert_eq!(
        format!("{:?}", TensorMut::new(&mut data, &[3, 8]).unwrap()),
        "TensorMut(F32, [3, 8])"
    );
}

#[test]
fn shapes_types_and_layers_of_calls() {
    let (mut s, sequence) = small();
    step(&mut s, &sequence, 3);
    let (data, halves) = ([0f32; 64], [F16(0); 64]);
    let t =
        |n: usize, heads: usize| TensorRef::new(&data[..n * heads * 8], &[n, heads, 8]).unwrap();
    let (mut out, mut lse) = ([7f32; 48], [7f32; 6]);
    let mut wrong = |k: &TensorRef<'_>, v: &TensorRef<'_>, layer: usize, part: &str| {
        fails(
            s.plan.append(&mut s.cache, layer, k, v),
            Status::Invalid,
            part,
        );
    };
    wrong(&t(2, 1), &t(3, 1), 0, "k: shape[0] is 2, expected 3");
    wrong(&t(3, 1), &t(3, 2), 0, "v: shape[1] is 2, expected 1");
    wrong(
        &t(3, 1),
        &TensorRef::new(&data[..24], &[3, 8]).unwrap(),
        0,
        "v: 2 dimensions",
    );
    wrong(&t(3, 1), &t(3, 1), 2, "layer is 2 of 2");
    wrong(&t(3, 1), &t(3, 1), usize::MAX, "layer");
    let gaps = TensorRef::with_strides(&data, &[3, 1, 8], &[16, 8, 2]).unwrap();
    wrong(&gaps, &t(3, 1), 0, "not contiguous");
    let none = TensorRef::with_strides(&data, &[3, 1, 8], &[0, 8, 1]).unwrap();
    wrong(&none, &t(3, 1), 0, "strides[0]");

    let mut attend = |shape: &[usize], strides: &[usize], lse_shape: &[usize], part: &str| {
        let mut out = TensorMut::with_strides(&mut out, shape, strides).unwrap();
        let mut lse = TensorMut::new(&mut lse[..lse_shape.iter().product()], lse_shape).unwrap();
        let result = s
            .plan
            .attend(&s.cache, 0, &t(3, 2), &mut out, Some(&mut lse));
        fails(result, Status::Invalid, part);
    };
    attend(&[3, 1, 8], &[8, 8, 1], &[3, 2], "out: shape[1]");
    attend(&[3, 2, 8], &[16, 8, 1], &[3, 1], "lse: shape[1]");
    attend(
        &[3, 2, 8],
        &[16, 4, 1],
        &[3, 2],
        "out: an output must not overlap itself",
    );
    let mut lse_bits = [F16(0); 6];
    let mut wrong_lse = TensorMut::new(&mut lse_bits, &[3, 2]).unwrap();
    let mut view = TensorMut::new(&mut out, &[3, 2, 8]).unwrap();
    let result = s
        .plan
        .attend(&s.cache, 0, &t(3, 2), &mut view, Some(&mut wrong_lse));
    fails(result, Status::Invalid, "lse: must be f32");
    // Nothing was written or appended.
    assert_eq!((out, lse), ([7f32; 48], [7f32; 6]));
    assert_eq!(s.cache.sequence_length(&sequence).unwrap(), 0);
    let half = TensorRef::new(&halves[..24], &[3, 1, 8]).unwrap();
    s.plan.append(&mut s.cache, 0, &half, &t(3, 1)).unwrap();
}

#[test]
fn steps_at_the_wrong_time() {
    let (mut s, sequence) = small();
    let data = [0f32; 8];
    let t = TensorRef::new(&data, &[1, 1, 8]).unwrap();
    step(&mut s, &sequence, 1);
    s.plan.append(&mut s.cache, 0, &t, &t).unwrap();
    fails(
        s.plan.append(&mut s.cache, 0, &t, &t),
        Status::State,
        "layer 0",
    );
    let mut batch = Batch::new();
    batch.push(&sequence, 1);
    fails(s.plan.update(&s.cache, &batch), Status::State, ""); // layer 1 has not had it
    s.plan.append(&mut s.cache, 1, &t, &t).unwrap();
    batch.push(&sequence, 1);
    fails(s.plan.update(&s.cache, &batch), Status::Invalid, "sequence");
    // A freed sequence outdates the plan.
    step(&mut s, &sequence, 1);
    s.cache.free_sequence(sequence).unwrap();
    let result = s.plan.append(&mut s.cache, 0, &t, &t);
    assert!(matches!(
        result.unwrap_err().status(),
        Status::State | Status::Handle
    ));
}

#[test]
fn things_of_another_cache() {
    let (mut s, sequence) = small();
    let mut other = setup(&ModelParams::new(2, 2, 1, 8), Dtype::F16);
    let foreign = other.cache.create_sequence().unwrap();
    assert_eq!(sequence.id(), foreign.id()); // so that only the check can tell
    assert_ne!(sequence, foreign);
    let text = "of another cache";
    fails(s.cache.sequence_length(&foreign), Status::Handle, text);
    fails(s.cache.sequence_stats(&foreign), Status::Handle, text);
    fails(
        s.cache.read(&foreign, 0, 0..0, None, None),
        Status::Handle,
        text,
    );
    let mut batch = Batch::new();
    batch.push(&sequence, 1).push(&foreign, 1);
    fails(s.plan.update(&s.cache, &batch), Status::Handle, text);
    fails(
        s.plan.update(&other.cache, &Batch::new()),
        Status::Handle,
        text,
    );
    step(&mut s, &sequence, 1);
    let (data, mut out) = ([0f32; 16], [7f32; 16]);
    let kv = TensorRef::new(&data[..8], &[1, 1, 8]).unwrap();
    let q = TensorRef::new(&data, &[1, 2, 8]).unwrap();
    let mut view = TensorMut::new(&mut out, &[1, 2, 8]).unwrap();
    fails(
        s.plan.append(&mut other.cache, 0, &kv, &kv),
        Status::Handle,
        text,
    );
    fails(
        s.plan.attend(&other.cache, 0, &q, &mut view, None),
        Status::Handle,
        text,
    );
    let both = s
        .plan
        .append_attend(&mut other.cache, 0, &q, &kv, &kv, &mut view, None);
    fails(both, Status::Handle, text);
    assert_eq!(out, [7f32; 16]);
    fails(s.cache.free_sequence(foreign), Status::Handle, text);
    assert_eq!(other.cache.stats().unwrap().sequences, 1);
}

#[test]
fn reading() {
    let (mut s, sequence) = small();
    step(&mut s, &sequence, 3);
    let data = Numbers::new(2).take(24);
    let t = TensorRef::new(&data, &[3, 1, 8]).unwrap();
    s.plan.append(&mut s.cache, 0, &t, &t).unwrap();
    let mut buffer = [0f32; 16];
    let mut k = TensorMut::new(&mut buffer, &[2, 1, 8]).unwrap();
    s.cache
        .read(&sequence, 0, 1..3, Some(&mut k), None)
        .unwrap();
    fails(
        s.cache.read(&sequence, 0, 2..4, Some(&mut k), None),
        Status::Invalid,
        "of 3",
    );
    fails(
        s.cache.read(&sequence, 1, 0..2, Some(&mut k), None),
        Status::Invalid,
        "of 0",
    );
    fails(
        s.cache.read(&sequence, 5, 0..2, None, Some(&mut k)),
        Status::Invalid,
        "layer is 5",
    );
    fails(
        s.cache.read(&sequence, 0, 0..3, Some(&mut k), None),
        Status::Invalid,
        "k: shape[0]",
    );
    #[allow(clippy::reversed_empty_ranges)]
    let reversed = 2..1;
    fails(
        s.cache.read(&sequence, 0, reversed, None, None),
        Status::Invalid,
        "range",
    );
    fails(
        s.cache.read(&sequence, 0, 0..usize::MAX, None, None),
        Status::Invalid,
        "too large",
    );
    let rounded: Vec<f32> = data[8..]
        .iter()
        .map(|&x| F16::from_f32(x).to_f32())
        .collect();
    assert_eq!(buffer.to_vec(), rounded);
}

#[test]
fn nan_and_values_beyond_the_type() {
    let (mut s, sequence) = small();
    step(&mut s, &sequence, 1);
    for bad in [f32::NAN, f32::INFINITY, 70000.0] {
        let mut data = [0f32; 8];
        data[5] = bad;
        let (t, zero) = (TensorRef::new(&data, &[1, 1, 8]).unwrap(), [0f32; 8]);
        let zero = TensorRef::new(&zero, &[1, 1, 8]).unwrap();
        fails(
            s.plan.append(&mut s.cache, 0, &t, &zero),
            Status::NonFinite,
            "k",
        );
        fails(
            s.plan.append(&mut s.cache, 0, &zero, &t),
            Status::NonFinite,
            "v",
        );
    }
    let mut params = ContextParams::default();
    params.propagate_nonfinite = true;
    let context = Context::with_params(&params).unwrap();
    let profile = Profile::exact(&context, &ModelParams::new(1, 1, 1, 8), Dtype::F32).unwrap();
    let mut cache = Cache::new(&context, &profile).unwrap();
    let sequence = cache.create_sequence().unwrap();
    let mut plan = Plan::new(&cache).unwrap();
    let mut batch = Batch::new();
    batch.push(&sequence, 1);
    plan.update(&cache, &batch).unwrap();
    let data = [f32::NAN; 8];
    let t = TensorRef::new(&data, &[1, 1, 8]).unwrap();
    plan.append(&mut cache, 0, &t, &t).unwrap();
}

#[test]
fn limits() {
    let context = context();
    let profile = Profile::exact(&context, &ModelParams::new(1, 1, 1, 8), Dtype::F16).unwrap();
    let mut params = CacheParams::default();
    params.max_tokens = 10;
    let mut cache = Cache::with_params(&context, &profile, &params).unwrap();
    let sequence = cache.create_sequence().unwrap();
    let mut plan = Plan::new(&cache).unwrap();
    for n in [11, usize::MAX] {
        let mut batch = Batch::new();
        batch.push(&sequence, n);
        fails(plan.update(&cache, &batch), Status::Limit, "");
    }
    params = CacheParams::default();
    params.max_bytes = 100;
    let tight = Cache::with_params(&context, &profile, &params).and_then(|mut cache| {
        let sequence = cache.create_sequence()?;
        let mut batch = Batch::new();
        batch.push(&sequence, 1000);
        let mut plan = Plan::new(&cache)?;
        plan.update(&cache, &batch)?;
        let data = vec![0f32; 8000];
        let t = TensorRef::new(&data, &[1000, 1, 8])?;
        plan.append(&mut cache, 0, &t, &t)
    });
    fails(tight, Status::Limit, "");
}

#[test]
fn files() {
    let context = context();
    let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("no/such.json");
    fails(Profile::load_file(&context, &path), Status::Io, "such.json");
    fails(
        Profile::load_file(&context, "a\0b"),
        Status::Invalid,
        "path",
    );
    let profile = Profile::exact(&context, &ModelParams::new(1, 1, 1, 8), Dtype::F16).unwrap();
    fails(profile.save_file(&path), Status::Io, "such.json");
    fails(Profile::load(&context, "{"), Status::Format, "line");
    fails(Profile::load(&context, ""), Status::Format, "");
    let text = profile.save().unwrap();
    let newer = text.replace("\"version\": 1", "\"version\": 99");
    fails(Profile::load(&context, newer), Status::Version, "version");
    let other = text.replace("\"head_dim\": 8", "\"head_dim\": \"8\"");
    fails(
        Profile::load(&context, other),
        Status::Format,
        "model.head_dim",
    );
    fails(profile.channels(1, Part::K), Status::Invalid, "layer 1");
    fails(
        profile.channels(0, Part::Unknown(3)),
        Status::Invalid,
        "part 3",
    );
    fails(profile.estimate(usize::MAX, 0), Status::Invalid, "tokens");
    fails(profile.estimate(1 << 40, 0), Status::Limit, "tokens");
}

#[test]
fn merging_what_does_not_fit() {
    let context = context();
    let (mut a, mut la) = ([1f32; 16], [0f32; 2]);
    let (b, lb) = ([1f32; 16], [0f32; 2]);
    let mut out = TensorMut::new(&mut a, &[1, 2, 8]).unwrap();
    let mut lse = TensorMut::new(&mut la, &[1, 2]).unwrap();
    let other = TensorRef::new(&b, &[2, 1, 8]).unwrap();
    let other_lse = TensorRef::new(&lb, &[1, 2]).unwrap();
    fails(
        context.merge(&mut out, &mut lse, &other, &other_lse),
        Status::Invalid,
        "out_b",
    );
}

#[test]
fn everything_is_given_back() {
    let context = context();
    let before = context.info().unwrap().live_bytes;
    {
        let profile = Profile::exact(&context, &ModelParams::new(1, 1, 1, 8), Dtype::F16).unwrap();
        let mut cache = Cache::new(&context, &profile).unwrap();
        drop(profile); // in any order: the cache keeps it
        let sequence = cache.create_sequence().unwrap();
        let mut plan = Plan::new(&cache).unwrap();
        let mut batch = Batch::new();
        batch.push(&sequence, 1);
        plan.update(&cache, &batch).unwrap();
        let data = [0f32; 8];
        let t = TensorRef::new(&data, &[1, 1, 8]).unwrap();
        plan.append(&mut cache, 0, &t, &t).unwrap();
        assert!(context.info().unwrap().live_bytes > before);
        drop(cache);
        drop(plan); // a plan may outlive its cache
    }
    let info = context.info().unwrap();
    assert_eq!(info.live_bytes, before);
    assert!(info.peak_bytes > before);
    // Objects keep the context, and with it the texts of their errors.
    let profile = Profile::exact(&context, &ModelParams::new(1, 1, 1, 8), Dtype::F16).unwrap();
    drop(context);
    fails(profile.channels(9, Part::V), Status::Invalid, "layer 9");
}
