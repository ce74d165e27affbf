// An input does not change under the library's hands.
use fkv::*;

pub fn f(cache: &mut Cache, plan: &mut Plan) -> Result<()> {
    let mut data = [0f32; 8];
    let kv = TensorRef::new(&data, &[1, 1, 8])?;
    data[0] = 1.0; // FAULT E0506
    plan.append(cache, 0, &kv, &kv)?;
    data[0] = 2.0;
    Ok(())
}

fn main() {}
