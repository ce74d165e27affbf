// Finds out which channels of a model can be held as Fourier coefficients, and what that saves.
use fkv::{
    Batch, Cache, Calibrator, CalibratorParams, Context, ModelParams, Part, Plan, Result, TensorRef,
};

const KV_HEADS: usize = 2;
const DIM: usize = 32;

/// Stands for the model's keys and values: half of the channels drift slowly, half are noise.
fn channels(tokens: usize) -> Vec<f32> {
    let mut noise = 1u32;
    let mut data = Vec::with_capacity(tokens * KV_HEADS * DIM);
    for token in 0..tokens {
        for channel in 0..KV_HEADS * DIM {
            noise = noise.wrapping_mul(1664525).wrapping_add(1013904223);
            data.push(if channel % 2 == 0 {
                (token as f32 * 0.002 * (channel + 1) as f32).sin()
            } else {
                noise as f32 / u32::MAX as f32 - 0.5
            });
        }
    }
    data
}

fn main() -> Result<()> {
    let (tokens, shape) = (2048, [2048, KV_HEADS, DIM]);
    let context = Context::new()?;
    let model = ModelParams::new(1, KV_HEADS, KV_HEADS, DIM);
    let data = channels(tokens);
    let kv = TensorRef::new(&data, &shape)?;

    let mut params = CalibratorParams::default();
    params.fourier.bins = 64;
    params.fourier.n_local = 256;
    params.fourier.period = tokens;
    let mut calibrator = Calibrator::new(&context, &model, &params)?;
    calibrator.observe(0, &kv, &kv, None)?; // layer 0: keys, values, no queries
    let errors = calibrator.errors(0, Part::V)?;
    println!(
        "error of a slow channel {:.5}, of a noisy one {:.5}",
        errors[0], errors[1]
    );
    let profile = calibrator.solve(&[0.5], &[0.5])?; // half of the channels of each layer

    let mut cache = Cache::new(&context, &profile)?;
    let sequence = cache.create_sequence()?;
    let mut plan = Plan::new(&cache)?;
    let mut batch = Batch::new();
    batch.push(&sequence, tokens);
    plan.update(&cache, &batch)?;
    plan.append(&mut cache, 0, &kv, &kv)?;
    println!("{:.2} times smaller than dense f16", cache.stats()?.ratio);
    Ok(())
}
