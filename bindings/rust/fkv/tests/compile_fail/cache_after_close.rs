// A closed cache cannot be asked.
fn main() -> fkv::Result<()> {
    let context = fkv::Context::new()?;
    let model = fkv::ModelParams::new(1, 1, 1, 8);
    let profile = fkv::Profile::exact(&context, &model, fkv::Dtype::F16)?;
    let cache = fkv::Cache::new(&context, &profile)?;
    drop(cache);
    println!("{:?}", cache.stats()?); // FAULT E0382
    Ok(())
}
