// A freed sequence cannot be named.
use fkv::*;

pub fn f(cache: &mut Cache, sequence: Sequence) -> Result<()> {
    cache.free_sequence(sequence)?;
    cache.free_sequence(sequence)?; // FAULT E0382
    Ok(())
}

fn main() {}
