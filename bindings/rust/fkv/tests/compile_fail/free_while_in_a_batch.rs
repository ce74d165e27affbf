// A batch borrows its sequences.
use fkv::*;

pub fn f(cache: &mut Cache, plan: &mut Plan, sequence: Sequence) -> Result<()> {
    let mut batch = Batch::new();
    batch.push(&sequence, 1);
    cache.free_sequence(sequence)?; // FAULT E0505
    plan.update(cache, &batch)
}

fn main() {}
