// SPDX-License-Identifier: Apache-2.0
//! What may cross threads does, and BUSY never comes. What must not is in compile_fail.rs.
mod common;
use common::*;
use fkv::*;
use std::sync::{Mutex, RwLock};
use std::thread;

fn send<T: Send>() {}
fn sync<T: Sync>() {}

#[test]
fn what_is_send_and_sync() {
    send::<Context>();
    sync::<Context>();
    send::<Profile>();
    sync::<Profile>();
    send::<Cache>();
    sync::<Cache>();
    send::<Plan>();
    send::<Calibrator>();
    send::<TensorRef<'_>>();
    sync::<TensorRef<'_>>();
    send::<TensorMut<'_>>();
    sync::<TensorMut<'_>>();
    send::<Sequence>();
    sync::<Sequence>();
    send::<Batch<'_>>();
    sync::<Batch<'_>>();
    send::<Error>();
    sync::<Error>();
}

const D: usize = 32;
const LENGTH: usize = 150;

fn filled(sequences: usize) -> (Setup, Vec<Sequence>) {
    let mut s = setup(&ModelParams::new(1, 2, 1, D), Dtype::F16);
    let ids: Vec<_> = (0..sequences)
        .map(|_| s.cache.create_sequence().unwrap())
        .collect();
    let mut batch = Batch::new();
    for id in &ids {
        batch.push(id, LENGTH);
    }
    let kv = Numbers::new(1).take(sequences * LENGTH * D);
    let kv = TensorRef::new(&kv, &[sequences * LENGTH, 1, D]).unwrap();
    s.plan.update(&s.cache, &batch).unwrap();
    s.plan.append(&mut s.cache, 0, &kv, &kv).unwrap();
    (s, ids)
}

fn attend(cache: &Cache, plan: &mut Plan, sequence: &Sequence, seed: u64) -> Vec<f32> {
    let (q, mut out) = (Numbers::new(seed).take(2 * D), vec![0f32; 2 * D]);
    let mut batch = Batch::new();
    batch.push(sequence, 1);
    plan.update(cache, &batch).unwrap();
    let q = TensorRef::new(&q, &[1, 2, D]).unwrap();
    let mut view = TensorMut::new(&mut out, &[1, 2, D]).unwrap();
    plan.attend(cache, 0, &q, &mut view, None).unwrap();
    out
}

#[test]
fn eight_threads_attend_on_one_cache() {
    let (mut s, ids) = filled(8);
    let alone: Vec<_> = ids
        .iter()
        .map(|id| attend(&s.cache, &mut s.plan, id, id.id() as u64))
        .collect();
    let cache = &s.cache;
    thread::scope(|scope| {
        for (id, expected) in ids.iter().zip(&alone) {
            scope.spawn(move || {
                let mut plan = Plan::new(cache).unwrap();
                for _ in 0..200 {
                    assert_eq!(&attend(cache, &mut plan, id, id.id() as u64), expected);
                    assert_eq!(cache.sequence_length(id).unwrap(), LENGTH);
                    assert_eq!(cache.stats().unwrap().sequences, 8);
                }
            });
        }
    });
}

/// A lock makes writers wait for readers, where the library alone would say BUSY.
#[test]
fn writers_and_readers_behind_a_lock() {
    let (s, ids) = filled(4);
    let cache = RwLock::new(s.cache);
    thread::scope(|scope| {
        for id in &ids {
            let cache = &cache;
            scope.spawn(move || {
                let mut plan = Plan::new(&cache.read().unwrap()).unwrap();
                for round in 0..30 {
                    attend(&cache.read().unwrap(), &mut plan, id, round);
                    let mut writer = cache.write().unwrap();
                    let mut batch = Batch::new();
                    batch.push(id, 1);
                    plan.update(&writer, &batch).unwrap();
                    let kv = Numbers::new(round).take(D);
                    let kv = TensorRef::new(&kv, &[1, 1, D]).unwrap();
                    plan.append(&mut writer, 0, &kv, &kv).unwrap();
                    let passing = writer.create_sequence().unwrap();
                    writer.free_sequence(passing).unwrap();
                }
            });
        }
    });
    let cache = cache.into_inner().unwrap();
    for id in &ids {
        assert_eq!(cache.sequence_length(id).unwrap(), LENGTH + 30);
    }
}

#[test]
fn objects_move_to_threads_and_end_there() {
    let (s, ids) = filled(1);
    let Setup {
        context,
        cache,
        mut plan,
    } = s;
    let worker = thread::spawn(move || {
        let out = attend(&cache, &mut plan, &ids[0], 1);
        drop(context);
        out
    });
    assert!(worker.join().unwrap().iter().all(|x| x.is_finite()));
}

#[test]
fn one_context_and_profile_for_many_threads() {
    let context = context();
    let profile = Profile::exact(&context, &ModelParams::new(1, 1, 1, 8), Dtype::F16).unwrap();
    let before = context.info().unwrap().live_bytes;
    thread::scope(|scope| {
        for n in 0..8u64 {
            let (context, profile) = (&context, &profile);
            scope.spawn(move || {
                for _ in 0..50 {
                    let mut cache = Cache::new(context, profile).unwrap();
                    let sequence = cache.create_sequence().unwrap();
                    assert_eq!(cache.sequence_length(&sequence).unwrap(), 0);
                    assert_eq!(profile.info().unwrap().head_dim, 8);
                    // The status is this call's; the text may be another thread's.
                    let error = profile.channels(1 + n as usize, Part::K).unwrap_err();
                    assert_eq!(error.status(), Status::Invalid);
                    assert!(error.message().starts_with("layer "), "{error}");
                }
            });
        }
    });
    assert_eq!(context.info().unwrap().live_bytes, before);
}

#[test]
fn a_calibrator_behind_a_mutex() {
    let context = context();
    let mut params = CalibratorParams::default();
    params.fourier.bins = 8;
    params.fourier.n_local = 64;
    let model = ModelParams::new(4, 1, 1, 8);
    let calibrator = Mutex::new(Calibrator::new(&context, &model, &params).unwrap());
    let data = Numbers::new(9).take(300 * 8);
    thread::scope(|scope| {
        for layer in 0..4 {
            let (calibrator, data) = (&calibrator, &data);
            scope.spawn(move || {
                let kv = TensorRef::new(data, &[300, 1, 8]).unwrap();
                calibrator
                    .lock()
                    .unwrap()
                    .observe(layer, &kv, &kv, None)
                    .unwrap();
            });
        }
    });
    let calibrator = calibrator.into_inner().unwrap();
    let profile = calibrator.solve(&[0.5; 4], &[0.5; 4]).unwrap();
    assert_eq!(profile.info().unwrap().k_fourier_channels, 16);
}
