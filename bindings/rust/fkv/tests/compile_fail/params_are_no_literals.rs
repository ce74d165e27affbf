// Parameters grow: a literal would have to change with the library.
use fkv::*;

fn main() {
    let params = SequenceParams { period: 64 }; // FAULT E0639
    let mut params = SequenceParams::default();
    params.period = 64;
    println!("{params:?}");
}
