// A writer has the cache alone.
use fkv::*;
use std::thread;

pub fn f(mut cache: Cache, mut plan: Plan, q: TensorRef<'_>, mut out: TensorMut<'_>) {
    thread::scope(|scope| {
        scope.spawn(|| plan.attend(&cache, 0, &q, &mut out, None));
        let _ = cache.create_sequence(); // FAULT E0502
    });
    let _ = cache.create_sequence();
}

fn main() {}
