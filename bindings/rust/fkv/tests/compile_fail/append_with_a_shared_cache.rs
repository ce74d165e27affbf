// Appending is writing.
use fkv::*;

pub fn f(cache: &mut Cache, plan: &mut Plan, kv: TensorRef<'_>) -> Result<()> {
    let shared: &Cache = cache;
    plan.append(shared, 0, &kv, &kv)?; // FAULT E0308
    println!("{shared:?}");
    plan.append(cache, 0, &kv, &kv)
}

fn main() {}
