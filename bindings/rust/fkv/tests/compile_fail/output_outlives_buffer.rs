// The same for outputs, by scope.
use fkv::*;

pub fn f(outer: &mut [f32]) -> Result<()> {
    let mut view = TensorMut::new(outer, &[1, 1, 8])?;
    println!("{view:?}");
    {
        let mut inner = vec![0f32; 8];
        inner[0] = 1.0;
        view = TensorMut::new(&mut inner, &[1, 1, 8])?; // FAULT E0597
    }
    println!("{view:?}");
    Ok(())
}

fn main() {}
