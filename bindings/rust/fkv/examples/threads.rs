// Several threads attend on one cache, each with a plan of its own; between the steps one appends.
use fkv::{
    Batch, Cache, Context, ContextParams, Dtype, ModelParams, Plan, Profile, Result, TensorMut,
    TensorRef,
};
use std::thread;

const DIM: usize = 64;

fn main() -> Result<()> {
    let mut params = ContextParams::default();
    params.threads = 1; // the threads are ours
    let context = Context::with_params(&params)?;
    let model = ModelParams::new(1, 1, 1, DIM);
    let profile = Profile::exact(&context, &model, Dtype::F32)?;
    let mut cache = Cache::new(&context, &profile)?;
    let mut sequences = Vec::new();
    for _ in 0..4 {
        sequences.push(cache.create_sequence()?);
    }

    // A writer has the cache alone.
    let kv: Vec<f32> = (0..4 * 100 * DIM).map(|i| (i as f32).cos()).collect();
    let kv = TensorRef::new(&kv, &[4 * 100, 1, DIM])?;
    let mut batch = Batch::new();
    for sequence in &sequences {
        batch.push(sequence, 100);
    }
    let mut plan = Plan::new(&cache)?;
    plan.update(&cache, &batch)?;
    plan.append(&mut cache, 0, &kv, &kv)?;

    // Readers share it.
    let cache = &cache;
    let sums = thread::scope(|scope| {
        let workers: Vec<_> = sequences
            .iter()
            .map(|sequence| {
                scope.spawn(move || -> Result<f32> {
                    let (q, mut out) = ([0.1f32; DIM], [0f32; DIM]);
                    let mut batch = Batch::new();
                    batch.push(sequence, 1);
                    let mut plan = Plan::new(cache)?;
                    plan.update(cache, &batch)?;
                    let mut view = TensorMut::new(&mut out, &[1, 1, DIM])?;
                    plan.attend(
                        cache,
                        0,
                        &TensorRef::new(&q, &[1, 1, DIM])?,
                        &mut view,
                        None,
                    )?;
                    Ok(out.iter().sum())
                })
            })
            .collect();
        workers
            .into_iter()
            .map(|w| w.join().expect("no panic"))
            .collect::<Result<Vec<f32>>>()
    })?;
    println!("sums of the outputs: {sums:?}");
    Ok(())
}
