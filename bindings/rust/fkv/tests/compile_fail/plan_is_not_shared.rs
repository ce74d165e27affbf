// Not even to look at: it is no Sync.
use fkv::*;

fn sync<T: Sync>() {}
fn send<T: Send>() {}

fn main() {
    send::<Plan>();
    sync::<Cache>();
    sync::<Plan>(); // FAULT E0277
}
