// A plan outlives its cache, but is of no use without it.
use fkv::*;

pub fn f(cache: Cache, mut plan: Plan, q: TensorRef<'_>, mut out: TensorMut<'_>) -> Result<()> {
    plan.attend(&cache, 0, &q, &mut out, None)?;
    drop(cache);
    plan.attend(&cache, 0, &q, &mut out, None)?; // FAULT E0382
    drop(plan);
    Ok(())
}

fn main() {}
