// SPDX-License-Identifier: Apache-2.0
//! The C interface as it is, for what the safe crate leaves out or makes impossible.
#![deny(unsafe_op_in_unsafe_fn)]
use fkv_sys::*;
use std::alloc::{alloc, dealloc, Layout};
use std::ffi::CStr;
use std::mem::{size_of, MaybeUninit};
use std::os::raw::{c_char, c_void};
use std::ptr::{null, null_mut};
use std::sync::atomic::{AtomicI32, AtomicI64, AtomicPtr, Ordering::SeqCst};

/// A struct as its _init function leaves it.
fn defaults<T>(init: unsafe extern "C" fn(*mut T, usize) -> fkv_status) -> T {
    let mut value = MaybeUninit::<T>::zeroed();
    // SAFETY: the size is that of the struct, and zeros are valid for all structs of the header.
    unsafe {
        assert_eq!(init(value.as_mut_ptr(), size_of::<T>()), FKV_OK);
        value.assume_init()
    }
}

fn small_model() -> fkv_model_params {
    let mut model = defaults(fkv_model_params_init);
    model.n_layers = 1;
    model.n_q_heads = 1;
    model.n_kv_heads = 1;
    model.head_dim = 8;
    model
}

struct Objects {
    context: *mut fkv_context,
    profile: *mut fkv_profile,
    cache: *mut fkv_cache,
    plan: *mut fkv_plan,
    sequence: fkv_sequence,
}

impl Objects {
    fn new(params: *const fkv_context_params) -> Self {
        let model = small_model();
        let mut o = Objects {
            context: null_mut(),
            profile: null_mut(),
            cache: null_mut(),
            plan: null_mut(),
            sequence: -1,
        };
        // SAFETY: outputs and structs live through the calls.
        unsafe {
            assert_eq!(fkv_context_create(params, &mut o.context), FKV_OK);
            let dtype = FKV_DTYPE_F32 as fkv_dtype;
            assert_eq!(
                fkv_profile_create_exact(o.context, &model, dtype, &mut o.profile),
                FKV_OK
            );
            assert_eq!(
                fkv_cache_create(o.context, o.profile, null(), &mut o.cache),
                FKV_OK
            );
            assert_eq!(
                fkv_sequence_create(o.cache, null(), &mut o.sequence),
                FKV_OK
            );
            assert_eq!(fkv_plan_create(o.cache, &mut o.plan), FKV_OK);
        }
        o
    }

    fn update(&self, n_new: i64) -> fkv_status {
        let mut batch = defaults(fkv_batch_init);
        batch.count = 1;
        batch.sequences = &self.sequence;
        batch.n_new = &n_new;
        // SAFETY: the batch and its arrays of one element live through the call.
        unsafe { fkv_plan_update(self.plan, &batch) }
    }

    fn append(&self, tokens: i64) -> fkv_status {
        let mut data = vec![0.5f32; tokens as usize * 8];
        let shape = [tokens, 1, 8];
        let mut tensor = MaybeUninit::<fkv_tensor>::zeroed();
        // SAFETY: three extents, and as many elements as they say.
        unsafe {
            let data = data.as_mut_ptr() as *mut c_void;
            let dtype = FKV_DTYPE_F32 as fkv_dtype;
            assert_eq!(
                fkv_tensor_init(tensor.as_mut_ptr(), data, dtype, 3, shape.as_ptr()),
                FKV_OK
            );
            fkv_append(self.plan, 0, tensor.as_ptr(), tensor.as_ptr())
        }
    }

    fn message(&self) -> String {
        let mut text = [0 as c_char; 512];
        // SAFETY: a buffer of the stated size, which the library ends with a zero.
        unsafe {
            let bytes = text.len();
            assert_eq!(
                fkv_context_message(self.context, text.as_mut_ptr(), bytes, null_mut()),
                FKV_OK
            );
            CStr::from_ptr(text.as_ptr()).to_str().unwrap().to_owned()
        }
    }
}

impl Drop for Objects {
    fn drop(&mut self) {
        // SAFETY: stale and NULL handles are refused or ignored.
        unsafe {
            fkv_plan_destroy(self.plan);
            fkv_cache_destroy(self.cache);
            fkv_profile_destroy(self.profile);
            fkv_context_destroy(self.context);
        }
    }
}

#[test]
fn versions_agree() {
    // SAFETY: no preconditions; the text is static.
    unsafe {
        assert_eq!(fkv_abi_version(), FKV_ABI_VERSION);
        let version = CStr::from_ptr(fkv_version_string()).to_str().unwrap();
        let expected = format!("{FKV_VERSION_MAJOR}.{FKV_VERSION_MINOR}.{FKV_VERSION_PATCH}");
        assert_eq!(version, expected);
        assert_eq!(version, env!("CARGO_PKG_VERSION"));
    }
}

#[test]
fn statuses_have_names() {
    let name = |status| {
        // SAFETY: any value may be passed; the text is static.
        unsafe { CStr::from_ptr(fkv_status_string(status)) }
            .to_str()
            .unwrap()
    };
    assert_eq!(name(FKV_ERR_CHECKSUM), "FKV_ERR_CHECKSUM");
    assert_eq!(name(12345), "unknown status");
}

#[test]
fn destroyed_and_wrong_handles_are_refused() {
    let o = Objects::new(null());
    // SAFETY: the library checks every handle before it follows it, which is what is tested.
    unsafe {
        assert_eq!(fkv_cache_destroy(o.plan as *mut fkv_cache), FKV_ERR_HANDLE);
        assert_eq!(fkv_cache_destroy(o.cache), FKV_OK);
        assert_eq!(fkv_cache_destroy(o.cache), FKV_ERR_HANDLE);
        assert_eq!(fkv_cache_destroy(null_mut()), FKV_OK);
    }
    assert_eq!(o.update(1), FKV_ERR_HANDLE);
    assert_eq!(o.message(), "the plan's cache was destroyed");
}

#[test]
fn a_struct_of_another_size_is_refused_or_ignored() {
    let mut context = null_mut();
    let mut params = defaults(fkv_context_params_init);
    params.struct_size = 8;
    // SAFETY: structs and outputs live through the calls.
    unsafe {
        assert_eq!(fkv_context_create(&params, &mut context), FKV_ERR_INVALID);
        assert!(context.is_null());
        // A newer, longer struct is taken as long as what is new in it is zero.
        #[repr(C)]
        struct Newer {
            params: fkv_context_params,
            extra: u64,
        }
        let mut newer = Newer {
            params: defaults(fkv_context_params_init),
            extra: 0,
        };
        newer.params.struct_size = size_of::<Newer>() as u32;
        let longer = &newer as *const Newer as *const fkv_context_params;
        assert_eq!(fkv_context_create(longer, &mut context), FKV_OK);
        assert_eq!(fkv_context_destroy(context), FKV_OK);
        newer.extra = 1;
        let longer = &newer as *const Newer as *const fkv_context_params;
        assert_eq!(
            fkv_context_create(longer, &mut context),
            FKV_ERR_UNSUPPORTED
        );
    }
}

/// Of all allocations: fkv_free_fn is not told which was asked for.
const ALIGNMENT: usize = 64;

#[derive(Default)]
struct Heap {
    live: AtomicI64,
    calls: AtomicI64,
    fail: AtomicI32,
    /// While set, every allocation tries to use the plan that is being used.
    objects: AtomicPtr<Objects>,
    status: AtomicI32,
}

unsafe extern "C" fn heap_alloc(user: *mut c_void, bytes: usize, alignment: usize) -> *mut c_void {
    // SAFETY: the test passes a Heap, which outlives the context; `objects` is set while it lives.
    let (heap, objects) = unsafe {
        let heap = &*(user as *const Heap);
        (heap, heap.objects.load(SeqCst).as_ref())
    };
    heap.calls.fetch_add(1, SeqCst);
    if let Some(objects) = objects {
        heap.status.store(objects.update(1), SeqCst);
    }
    if heap.fail.load(SeqCst) != 0 || alignment > ALIGNMENT {
        return null_mut();
    }
    heap.live.fetch_add(bytes as i64, SeqCst);
    // SAFETY: the library asks for at least one byte.
    unsafe { alloc(Layout::from_size_align(bytes, ALIGNMENT).unwrap()) as *mut c_void }
}

unsafe extern "C" fn heap_free(user: *mut c_void, pointer: *mut c_void, bytes: usize) {
    // SAFETY: as above; what was allocated has the size that is passed, and one alignment.
    unsafe {
        (*(user as *const Heap))
            .live
            .fetch_sub(bytes as i64, SeqCst);
        dealloc(
            pointer as *mut u8,
            Layout::from_size_align(bytes, ALIGNMENT).unwrap(),
        );
    }
}

fn params_with(heap: &Heap) -> fkv_context_params {
    let mut params = defaults(fkv_context_params_init);
    params.threads = 1;
    params.alloc = Some(heap_alloc);
    params.free = Some(heap_free);
    params.alloc_user = heap as *const Heap as *mut c_void;
    params
}

#[test]
fn an_allocator_of_ones_own_counts_and_fails() {
    let heap = Heap::default();
    let objects = Objects::new(&params_with(&heap));
    assert_eq!(objects.update(100), FKV_OK);
    let mut info = MaybeUninit::<fkv_context_info>::zeroed();
    // SAFETY: a struct that states its size.
    let info = unsafe {
        (*info.as_mut_ptr()).struct_size = size_of::<fkv_context_info>() as u32;
        assert_eq!(
            fkv_context_query(objects.context, info.as_mut_ptr()),
            FKV_OK
        );
        info.assume_init()
    };
    assert_eq!(info.live_bytes as i64, heap.live.load(SeqCst));
    heap.fail.store(1, SeqCst);
    assert_eq!(objects.append(100), FKV_ERR_NOMEM);
    heap.fail.store(0, SeqCst);
    assert_eq!(objects.append(100), FKV_OK); // the failure has changed nothing
    drop(objects);
    assert!(heap.calls.load(SeqCst) > 0);
    assert_eq!(heap.live.load(SeqCst), 0);
}

#[test]
fn a_plan_in_use_is_busy() {
    let heap = Heap::default();
    let objects = Objects::new(&params_with(&heap));
    assert_eq!(objects.update(100), FKV_OK);
    heap.objects
        .store(&objects as *const Objects as *mut Objects, SeqCst);
    assert_eq!(objects.append(100), FKV_OK);
    heap.objects.store(null_mut(), SeqCst);
    assert_eq!(heap.status.load(SeqCst), FKV_ERR_BUSY);
    assert_eq!(objects.message(), "another thread is using the plan");
}
