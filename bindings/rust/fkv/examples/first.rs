// A prompt of 100 tokens in each of two sequences, then one token of each in one batch.
use fkv::{
    Batch, Cache, Context, Dtype, ModelParams, Plan, Profile, Result, RopeLayout, Sequence,
    TensorMut, TensorRef,
};

const LAYERS: usize = 2;
const QUERY_HEADS: usize = 4;
const KV_HEADS: usize = 2;
const DIM: usize = 64;
const PROMPT: usize = 100;

/// Stands for the model: [tokens, heads, DIM] numbers.
fn projection(tokens: usize, heads: usize) -> Vec<f32> {
    (0..tokens * heads * DIM)
        .map(|i| (i as f32).sin())
        .collect()
}

/// One step: `n_new` tokens of each sequence through all layers.
fn step(cache: &mut Cache, plan: &mut Plan, sequences: &[Sequence], n_new: usize) -> Result<()> {
    let mut batch = Batch::new();
    for sequence in sequences {
        batch.push(sequence, n_new);
    }
    plan.update(cache, &batch)?;

    let tokens = sequences.len() * n_new;
    let (q, k) = (
        projection(tokens, QUERY_HEADS),
        projection(tokens, KV_HEADS),
    );
    let v = projection(tokens, KV_HEADS);
    let mut out = vec![0f32; q.len()];
    for layer in 0..LAYERS {
        plan.append_attend(
            cache,
            layer,
            &TensorRef::new(&q, &[tokens, QUERY_HEADS, DIM])?,
            &TensorRef::new(&k, &[tokens, KV_HEADS, DIM])?,
            &TensorRef::new(&v, &[tokens, KV_HEADS, DIM])?,
            &mut TensorMut::new(&mut out, &[tokens, QUERY_HEADS, DIM])?,
            None,
        )?;
    }
    Ok(())
}

fn main() -> Result<()> {
    let context = Context::new()?;
    let mut model = ModelParams::new(LAYERS, QUERY_HEADS, KV_HEADS, DIM);
    model.rope_layout = RopeLayout::HalfSplit; // q and k are given before RoPE
    model.inv_freq = (0..DIM / 2)
        .map(|j| 10000f64.powf(-2.0 * j as f64 / DIM as f64))
        .collect();

    let profile = Profile::exact(&context, &model, Dtype::F16)?;
    let mut cache = Cache::new(&context, &profile)?;
    let mut plan = Plan::new(&cache)?;
    let sequences = [cache.create_sequence()?, cache.create_sequence()?];

    step(&mut cache, &mut plan, &sequences, PROMPT)?; // prefill
    step(&mut cache, &mut plan, &sequences, 1)?; // decode

    let stats = cache.stats()?;
    println!("{} tokens in {} bytes", stats.tokens, stats.bytes);
    Ok(())
}
