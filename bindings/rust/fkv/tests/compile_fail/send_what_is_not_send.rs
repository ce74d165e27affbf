// A plan on a cache that is kept by an Rc stays in its thread.
use fkv::*;
use std::{rc::Rc, sync::Arc, thread};

pub fn f(cache: Arc<Cache>, local: Rc<Cache>) {
    let _ = thread::spawn(move || cache.stats());
    let _ = thread::spawn(move || local.stats()); // FAULT E0277
}

fn main() {}
