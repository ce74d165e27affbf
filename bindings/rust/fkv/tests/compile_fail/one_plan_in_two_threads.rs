// One plan serves one thread at a time.
use fkv::*;
use std::thread;

pub fn f(cache: &Cache, mut plan: Plan) {
    thread::scope(|scope| {
        scope.spawn(|| plan.update(cache, &Batch::new()));
        scope.spawn(|| plan.update(cache, &Batch::new())); // FAULT E0499
    });
}

fn main() {}
