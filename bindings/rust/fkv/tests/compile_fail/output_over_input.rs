// Outputs do not overlap inputs.
use fkv::*;

pub fn f(cache: &Cache, plan: &mut Plan, q: &mut [f32], other: &mut [f32]) -> Result<()> {
    let view = TensorRef::new(q, &[1, 1, 8])?;
    let mut out = TensorMut::new(other, &[1, 1, 8])?;
    plan.attend(cache, 0, &view, &mut out, None)?;
    let mut out = TensorMut::new(q, &[1, 1, 8])?; // FAULT E0502
    plan.attend(cache, 0, &view, &mut out, None)
}

fn main() {}
