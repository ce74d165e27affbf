// SPDX-License-Identifier: Apache-2.0
//! The calibrated coding, and selection on unrotated keys.
mod common;
use common::*;
use fkv::*;

const D: usize = 16;
const TOKENS: usize = 300;

fn codec(domain: Domain) -> CodecParams {
    let mut codec = CodecParams::default();
    codec.storage_dtype = Dtype::F32;
    codec.group = 64;
    codec.block = 64;
    codec.n_local = 16;
    codec.domain = domain;
    codec
}

/// A cache of one layer and head that holds TOKENS random tokens: (cache, sequence, plan, v).
fn filled(context: &Context, profile: &Profile) -> (Cache, Sequence, Plan, Vec<f32>) {
    let mut cache = Cache::new(context, profile).unwrap();
    let sequence = cache.create_sequence().unwrap();
    let mut plan = Plan::new(&cache).unwrap();
    let mut numbers = Numbers::new(5);
    let (k, v) = (numbers.take(TOKENS * D), numbers.take(TOKENS * D));
    let mut batch = Batch::new();
    batch.push(&sequence, TOKENS);
    plan.update(&cache, &batch).unwrap();
    let shape = [TOKENS, 1, D];
    plan.append(
        &mut cache,
        0,
        &TensorRef::new(&k, &shape).unwrap(),
        &TensorRef::new(&v, &shape).unwrap(),
    )
    .unwrap();
    (cache, sequence, plan, v)
}

#[test]
fn bits_and_carriers_are_what_was_given() {
    let (context, model) = (context(), ModelParams::new(1, 1, 1, D));
    let k: Vec<_> = (0..D)
        .map(|d| [Channel::Carrier, Channel::Bits4][d % 2])
        .collect();
    let v = vec![Channel::Bits2; D];
    let mu: Vec<f32> = (0..D).map(|d| d as f32).collect();
    let rotated = codec(Domain::Rotated);
    let profile = Profile::coded(&context, &model, &rotated, [&k, &v], [&mu, &[]]).unwrap();
    assert_eq!(profile.channels(0, Part::K).unwrap(), k);
    assert_eq!(profile.carriers(0, Part::K).unwrap(), mu);
    assert_eq!(profile.carriers(0, Part::V).unwrap(), vec![0.0; D]);
    let info = profile.info().unwrap();
    assert_eq!(
        (info.coding, info.group, info.block),
        (Coding::Calibrated, 64, 64)
    );
    assert!(info.k_bits > 2.0 && info.domain == Domain::Rotated);
    profile.match_model(&model).unwrap();
    let error = profile
        .match_model(&ModelParams::new(2, 1, 1, D))
        .unwrap_err();
    assert_eq!(error.status(), Status::Mismatch);
    let fourier = vec![Channel::Fourier; D];
    let error = Profile::coded(&context, &model, &rotated, [&fourier, &v], [&[], &[]]).unwrap_err();
    assert_eq!(error.status(), Status::Invalid);
    assert!(Profile::coded(&context, &model, &rotated, [&k, &v], [&mu, &mu[1..]]).is_err());
}

#[test]
fn more_bits_take_more_bytes_and_are_nearer() {
    let (context, model) = (context(), ModelParams::new(1, 1, 1, D));
    let (mut bytes, mut error) = (0, f32::INFINITY);
    for bits in [
        Channel::Bits2,
        Channel::Bits3,
        Channel::Bits4,
        Channel::Bits8,
    ] {
        let profile = Profile::uniform(&context, &model, &codec(Domain::Rotated), bits).unwrap();
        let (cache, sequence, _, v) = filled(&context, &profile);
        let stats = cache.stats().unwrap();
        assert!(stats.bytes_blocks > bytes && stats.bytes_scales > 0);
        assert_eq!(stats, profile.estimate(TOKENS, 0).unwrap());
        let mut held = vec![0f32; TOKENS * D];
        let mut view = TensorMut::new(&mut held, &[TOKENS, 1, D]).unwrap();
        cache
            .read(&sequence, 0, 0..TOKENS, None, Some(&mut view))
            .unwrap();
        let worst = held
            .iter()
            .zip(&v)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(worst > 0.0 && worst < error);
        bytes = stats.bytes_blocks;
        error = worst;
    }
}

#[test]
fn selection_sees_a_finite_view() {
    let (context, model) = (context(), ModelParams::new(1, 1, 1, D));
    let profile =
        Profile::uniform(&context, &model, &codec(Domain::Unrotated), Channel::Exact).unwrap();
    let (mut cache, sequence, mut plan, _) = filled(&context, &profile);
    let params = SelectParams {
        n_global: 4,
        n_local: 16,
        span: 4,
        top_k: 2,
        clip: 3,
        chunk: 8,
    };
    plan.select(Some(&params)).unwrap();
    assert_eq!(plan.selection(0).unwrap_err().status(), Status::State);
    let one = Numbers::new(9).take(D);
    let mut out = vec![0f32; D];
    let mut batch = Batch::new();
    batch.push(&sequence, 1);
    plan.update(&cache, &batch).unwrap();
    let token = TensorRef::new(&one, &[1, 1, D]).unwrap();
    plan.append_attend(
        &mut cache,
        0,
        &token,
        &token,
        &token,
        &mut TensorMut::new(&mut out, &[1, 1, D]).unwrap(),
        None,
    )
    .unwrap();
    let seen = plan.selection(0).unwrap();
    assert_eq!(
        (seen.layer, seen.tokens, seen.middle.clone()),
        (0, TOKENS + 1, 4..TOKENS - 15)
    );
    assert!(!seen.spans.is_empty() && seen.view <= 4 + 12 + 16);
    assert!(seen
        .spans
        .iter()
        .all(|s| s.start >= seen.middle.start && s.end <= seen.middle.end));
    plan.select(None).unwrap();
    let defaults = SelectParams::default();
    assert!(defaults.n_local > 0 && defaults.top_k as usize <= MAX_TOP_K);
    assert!((defaults.n_local as usize) < MAX_SCOPE);
}

#[test]
fn an_index_of_keys_is_counted() {
    let (context, model) = (context(), ModelParams::new(1, 1, 1, D));
    let exact = Channel::Exact;
    let unrotated = Profile::uniform(&context, &model, &codec(Domain::Unrotated), exact).unwrap();
    let rotated = Profile::uniform(&context, &model, &codec(Domain::Rotated), exact).unwrap();
    let mut params = CacheParams::default();
    assert!(!params.key_index);
    params.key_index = true;
    let error = Cache::with_params(&context, &rotated, &params).unwrap_err();
    assert_eq!(error.status(), Status::Unsupported);
    let mut cache = Cache::with_params(&context, &unrotated, &params).unwrap();
    let sequence = cache.create_sequence().unwrap();
    let mut plan = Plan::new(&cache).unwrap();
    let numbers = Numbers::new(6).take(TOKENS * D);
    let mut batch = Batch::new();
    batch.push(&sequence, TOKENS);
    plan.update(&cache, &batch).unwrap();
    let kv = TensorRef::new(&numbers, &[TOKENS, 1, D]).unwrap();
    plan.append(&mut cache, 0, &kv, &kv).unwrap();
    let stats = cache.stats().unwrap();
    assert!(stats.tokens_coded > 0);
    assert!(stats.bytes_index >= stats.tokens_coded * D as u64);
}

#[test]
fn rotated_keys_cannot_be_selected() {
    let (context, model) = (context(), ModelParams::new(1, 1, 1, D));
    let profile = Profile::exact(&context, &model, Dtype::F32).unwrap();
    let cache = Cache::new(&context, &profile).unwrap();
    let error = Plan::new(&cache)
        .unwrap()
        .select(Some(&SelectParams::default()))
        .unwrap_err();
    assert_eq!(error.status(), Status::Unsupported);
}

#[test]
fn bits_go_where_the_gradients_are() {
    let (context, model) = (context(), ModelParams::new(1, 1, 1, D));
    let mut params = CalibratorParams::default();
    params.criterion = Criterion::Sensitivity;
    params.codec = codec(Domain::Rotated);
    let mut whole = Calibrator::new(&context, &model, &params).unwrap();
    let mut parts = [0, 1].map(|_| Calibrator::new(&context, &model, &params).unwrap());
    let shape = [64, 1, D];
    for window in 0..4 {
        let mut numbers = Numbers::new(20 + window as u64);
        let (k, v) = (numbers.take(64 * D), numbers.take(64 * D));
        // Channel d of K matters the more the higher d is; V does not matter.
        let steep: Vec<f32> = (0..64 * D).map(|i| (i % D) as f32 * 0.01).collect();
        let flat = vec![0f32; 64 * D];
        let tensors = [&k, &v, &steep, &flat].map(|x| TensorRef::new(x, &shape).unwrap());
        for calibrator in [&mut whole, &mut parts[window % 2]] {
            let gradients = Some([&tensors[2], &tensors[3]]);
            calibrator
                .observe_gradients(0, &tensors[0], &tensors[1], gradients, None)
                .unwrap();
        }
    }
    let saved = Calibrator::load(&context, &model, &parts[1].save().unwrap()).unwrap();
    parts[0].merge(&saved).unwrap();
    for part in [Part::K, Part::V] {
        let (a, b) = (
            whole.statistic(0, part, Statistic::Variance).unwrap(),
            parts[0].statistic(0, part, Statistic::Variance).unwrap(),
        );
        assert!(a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 1e-9));
    }
    let mut target = AllocationParams::default();
    target.target = Target::Bits;
    target.value = 1.5;
    let (profile, info) = whole.allocate(&target).unwrap();
    assert!(info.bits <= 1.5 && info.predicted_loss < info.carrier_loss);
    let k = profile.channels(0, Part::K).unwrap();
    assert_eq!(k[0], Channel::Carrier);
    assert_ne!(k[D - 1], Channel::Carrier);
    assert_eq!(
        profile.channels(0, Part::V).unwrap(),
        vec![Channel::Carrier; D]
    );
    whole.weigh_values(0, &[1.0; D]).unwrap();
    let other = ModelParams::new(1, 1, 1, 2 * D);
    let error = Calibrator::load(&context, &other, &whole.save().unwrap()).unwrap_err();
    assert_eq!(error.status(), Status::Mismatch);
}

#[test]
fn bits_go_where_the_losses_are() {
    let (context, model) = (context(), ModelParams::new(1, 1, 1, D));
    let (mut k, v) = ([0.0; D], [1e-9; D]);
    k[3] = 1.0;
    let mut target = AllocationParams::default();
    target.target = Target::Loss;
    target.value = 0.5;
    let codec = codec(Domain::Rotated);
    let (profile, info) =
        Profile::allocated(&context, &model, &codec, &target, [&k, &v], [&[], &[]]).unwrap();
    assert!(info.predicted_loss <= 0.5);
    let bits = profile.channels(0, Part::K).unwrap();
    assert!(bits
        .iter()
        .enumerate()
        .all(|(d, &b)| (b != Channel::Carrier) == (d == 3)));
    target.value = -1.0;
    assert!(Profile::allocated(&context, &model, &codec, &target, [&k, &v], [&[], &[]]).is_err());
}

#[test]
fn streams_and_graphs_are_for_devices() {
    let context = context();
    context.synchronize().unwrap();
    // SAFETY: the CPU has no streams: the pointer is not looked at.
    let error = unsafe { context.set_stream(std::ptr::null_mut()) }.unwrap_err();
    assert_eq!(error.status(), Status::Unsupported);
    let profile = Profile::exact(&context, &ModelParams::new(1, 1, 1, D), Dtype::F32).unwrap();
    let mut cache = Cache::new(&context, &profile).unwrap();
    let mut plan = Plan::new(&cache).unwrap();
    let error = plan.replayed(&mut cache).unwrap_err();
    assert_eq!(error.status(), Status::Unsupported);
}

#[test]
fn the_meter_tells_good_codings_from_bad_ones() {
    let (context, model) = (context(), ModelParams::new(1, 1, 1, D));
    let codec = codec(Domain::Rotated);
    let mut numbers = Numbers::new(9);
    let shape = [TOKENS, 1, D];
    let x = numbers.take(TOKENS * D);
    let x = TensorRef::new(&x, &shape).unwrap();
    let mut errors = Vec::new();
    for bits in [Channel::Bits2, Channel::Bits8] {
        let profile = Profile::uniform(&context, &model, &codec, bits).unwrap();
        let mut cache = Cache::new(&context, &profile).unwrap();
        assert_eq!(cache.fidelity(None).unwrap_err().status(), Status::State);
        cache.meter(1.0).unwrap();
        let sequence = cache.create_sequence().unwrap();
        let mut plan = Plan::new(&cache).unwrap();
        let mut batch = Batch::new();
        batch.push(&sequence, TOKENS);
        plan.update(&cache, &batch).unwrap();
        let mut out = vec![0f32; TOKENS * D];
        let mut out = TensorMut::new(&mut out, &shape).unwrap();
        plan.append_attend(&mut cache, 0, &x, &x, &x, &mut out, None)
            .unwrap();
        let found = cache.fidelity(Some(0)).unwrap();
        assert_eq!(found, cache.fidelity(None).unwrap());
        assert_eq!(
            (found.blocks, found.samples, found.blocks_missed),
            (4, 4, 0)
        );
        assert!(found.fraction == 1.0 && found.weight > 0.0 && found.output_error > 0.0);
        errors.push(found.block_error);
        assert_eq!(
            cache.fidelity(Some(1)).unwrap_err().status(),
            Status::Invalid
        );
        assert_eq!(cache.meter(1.5).unwrap_err().status(), Status::Invalid);
        cache.meter(0.0).unwrap();
    }
    assert!(errors[0] > 10.0 * errors[1], "{errors:?}");
    let exact = Profile::exact(&context, &model, Dtype::F16).unwrap();
    let mut cache = Cache::new(&context, &exact).unwrap();
    assert_eq!(cache.meter(1.0).unwrap_err().status(), Status::Unsupported);
}
