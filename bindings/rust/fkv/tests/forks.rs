// SPDX-License-Identifier: Apache-2.0
//! Forks and crops: what is left is what was there, and what one writes the other does not see.
mod common;
use common::*;
use fkv::*;

const D: usize = 16;

/// Appends `tokens` tokens with the numbers of `seed` to one sequence.
fn append(s: &mut Setup, sequence: &Sequence, tokens: usize, seed: u64) {
    let mut numbers = Numbers::new(seed);
    let (k, v) = (numbers.take(tokens * D), numbers.take(tokens * D));
    let mut batch = Batch::new();
    batch.push(sequence, tokens);
    s.plan.update(&s.cache, &batch).unwrap();
    let shape = [tokens, 1, D];
    let (k, v) = (
        TensorRef::new(&k, &shape).unwrap(),
        TensorRef::new(&v, &shape).unwrap(),
    );
    s.plan.append(&mut s.cache, 0, &k, &v).unwrap();
}

fn keys(s: &Setup, sequence: &Sequence) -> Vec<f32> {
    let tokens = s.cache.sequence_length(sequence).unwrap();
    let mut k = vec![0f32; tokens * D];
    let mut view = TensorMut::new(&mut k, &[tokens, 1, D]).unwrap();
    s.cache
        .read(sequence, 0, 0..tokens, Some(&mut view), None)
        .unwrap();
    k
}

#[test]
fn a_fork_goes_its_own_way() {
    let mut s = setup(&ModelParams::new(1, 1, 1, D), Dtype::F32);
    let parent = s.cache.create_sequence().unwrap();
    append(&mut s, &parent, 200, 1);
    let before = keys(&s, &parent);
    let child = s.cache.fork_sequence(&parent).unwrap();
    let shared = s.cache.sequence_stats(&child).unwrap().bytes_shared;
    assert!(shared > 0 && shared <= s.cache.stats().unwrap().bytes);
    append(&mut s, &child, 3, 2);
    assert_eq!(keys(&s, &parent), before);
    assert_eq!(keys(&s, &child)[..before.len()], before[..]);
    s.cache.free_sequence(parent).unwrap();
    assert_eq!(keys(&s, &child).len(), 203 * D);
    assert_eq!(s.cache.stats().unwrap().bytes_shared, 0);
}

#[test]
fn a_crop_leaves_what_was_there() {
    let mut s = setup(&ModelParams::new(1, 1, 1, D), Dtype::F32);
    let sequence = s.cache.create_sequence().unwrap();
    append(&mut s, &sequence, 130, 3);
    let before = keys(&s, &sequence);
    append(&mut s, &sequence, 5, 4);
    assert_eq!(s.cache.crop_limit(&sequence).unwrap(), 0);
    assert_eq!(s.cache.crop_floor(&sequence, 130).unwrap(), 130);
    s.cache.crop_sequence(&sequence, 130).unwrap();
    assert_eq!(keys(&s, &sequence), before);
    let error = s.cache.crop_sequence(&sequence, 131).unwrap_err();
    assert_eq!(error.status(), Status::Invalid);
    s.cache.crop_sequence(&sequence, 0).unwrap();
    assert_eq!(s.cache.sequence_length(&sequence).unwrap(), 0);
}
