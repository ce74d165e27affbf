// A view of a local buffer cannot leave the function.
use fkv::*;

pub fn f(given: &[f32]) -> Result<TensorRef<'_>> {
    let local = vec![0f32; 8];
    println!("{local:?}");
    return TensorRef::new(&local, &[1, 1, 8]); // FAULT E0515
    #[allow(unreachable_code)]
    TensorRef::new(given, &[1, 1, 8])
}

fn main() {}
