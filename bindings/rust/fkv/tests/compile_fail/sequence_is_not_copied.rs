// Two owners of a sequence could free it twice.
use fkv::*;

pub fn f(sequence: &Sequence) -> &Sequence {
    let _copy: Sequence = sequence.clone(); // FAULT E0308
    sequence
}

fn main() {}
