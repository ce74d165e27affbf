// A tensor is a view.
use fkv::*;

fn main() -> Result<()> {
    let mut buffer = vec![0f32; 8];
    let tensor = TensorRef::new(&buffer, &[1, 1, 8])?;
    drop(buffer); // FAULT E0505
    println!("{tensor:?}");
    buffer = Vec::new();
    println!("{buffer:?}");
    Ok(())
}
