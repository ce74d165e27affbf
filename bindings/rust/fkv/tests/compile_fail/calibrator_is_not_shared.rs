// Reading the sums is a call like any other: one thread at a time.
use fkv::*;
use std::thread;

pub fn f(calibrator: Calibrator) {
    thread::scope(|scope| {
        scope.spawn(|| calibrator.errors(0, Part::K)); // FAULT E0277
    });
    let _ = calibrator.errors(0, Part::K);
}

fn main() {}
