// SPDX-License-Identifier: Apache-2.0
use crate::convert::{int64, Struct};
use crate::{sys, Bf16, Dtype, Error, Result, Status, F16, MAX_NDIM};
use std::fmt;
use std::marker::PhantomData;
use std::os::raw::c_void;

mod sealed {
    pub trait Sealed {}
    impl Sealed for f32 {}
    impl Sealed for crate::F16 {}
    impl Sealed for crate::Bf16 {}
}

/// Types that a tensor's elements can have.
pub trait Element: sealed::Sealed + Copy + Send + Sync + 'static {
    /// The library's name of the type.
    const DTYPE: Dtype;
}

impl Element for f32 {
    const DTYPE: Dtype = Dtype::F32;
}
impl Element for F16 {
    const DTYPE: Dtype = Dtype::F16;
}
impl Element for Bf16 {
    const DTYPE: Dtype = Dtype::Bf16;
}

/// A borrowed array that the library reads: nothing is copied.
///
/// Token tensors are `[tokens, heads, D]`: q has Hq heads, k and v Hk; the tokens of all sequences of a
/// batch follow one another in batch order. The last dimension is contiguous.
///
/// ```compile_fail,E0597
/// # use fkv::TensorRef;
/// let tensor = {
///     let buffer = vec![0f32; 8];
///     TensorRef::new(&buffer, &[1, 1, 8]) // `buffer` does not live long enough
/// };
/// println!("{tensor:?}");
/// ```
#[derive(Clone, Copy)]
pub struct TensorRef<'a> {
    raw: sys::fkv_tensor,
    memory: PhantomData<&'a [u8]>,
}

/// A borrowed array that the library writes: out `[tokens, Hq, D]`, lse `[tokens, Hq]`. The borrow is
/// exclusive, so no input can overlap it.
pub struct TensorMut<'a> {
    raw: sys::fkv_tensor,
    memory: PhantomData<&'a mut [u8]>,
}

// SAFETY: stands for a &[T] of an Element, which is Send and Sync.
unsafe impl Send for TensorRef<'_> {}
// SAFETY: as above.
unsafe impl Sync for TensorRef<'_> {}
// SAFETY: stands for a &mut [T] of an Element, which is Send and Sync.
unsafe impl Send for TensorMut<'_> {}
// SAFETY: as above; a &TensorMut writes nothing.
unsafe impl Sync for TensorMut<'_> {}

impl<'a> TensorRef<'a> {
    /// A contiguous (row-major) array. `data` has as many elements as `shape` says.
    ///
    /// Errors: Invalid (another number of elements, no or more than 4 dimensions), Limit (overflow).
    pub fn new<T: Element>(data: &'a [T], shape: &[usize]) -> Result<Self> {
        let raw = contiguous(data.as_ptr() as *mut c_void, data.len(), T::DTYPE, shape)?;
        Ok(TensorRef {
            raw,
            memory: PhantomData,
        })
    }

    /// An array whose neighbours in dimension `i` are `strides[i]` elements apart, such as a slice of a
    /// fused projection or `[heads, tokens, D]`. `data` begins with the first element and reaches at
    /// least to the last.
    ///
    /// ```
    /// # use fkv::TensorRef;
    /// # fn main() -> fkv::Result<()> {
    /// let qkv = vec![0f32; 5 * 3 * 64]; // 5 tokens, one head each of q, k and v
    /// let k = TensorRef::with_strides(&qkv[64..], &[5, 1, 64], &[3 * 64, 64, 1])?;
    /// # assert_eq!(k.shape(), [5, 1, 64]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn with_strides<T: Element>(
        data: &'a [T],
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        let raw = strided(
            data.as_ptr() as *mut c_void,
            data.len(),
            T::DTYPE,
            shape,
            strides,
        )?;
        Ok(TensorRef {
            raw,
            memory: PhantomData,
        })
    }

    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        Dtype::from_raw(self.raw.dtype)
    }

    /// Extents.
    pub fn shape(&self) -> &[i64] {
        shape_of(&self.raw)
    }

    pub(crate) fn as_raw(&self) -> &sys::fkv_tensor {
        &self.raw
    }
}

impl<'a> TensorMut<'a> {
    /// A contiguous (row-major) array; see [`TensorRef::new`].
    pub fn new<T: Element>(data: &'a mut [T], shape: &[usize]) -> Result<Self> {
        let raw = contiguous(
            data.as_mut_ptr() as *mut c_void,
            data.len(),
            T::DTYPE,
            shape,
        )?;
        Ok(TensorMut {
            raw,
            memory: PhantomData,
        })
    }

    /// An array with strides in elements; see [`TensorRef::with_strides`]. Elements between the rows are
    /// left as they are. Rows that overlap are refused by the call that would write them.
    pub fn with_strides<T: Element>(
        data: &'a mut [T],
        shape: &[usize],
        strides: &[usize],
    ) -> Result<Self> {
        let raw = strided(
            data.as_mut_ptr() as *mut c_void,
            data.len(),
            T::DTYPE,
            shape,
            strides,
        )?;
        Ok(TensorMut {
            raw,
            memory: PhantomData,
        })
    }

    /// Type of the elements.
    pub fn dtype(&self) -> Dtype {
        Dtype::from_raw(self.raw.dtype)
    }

    /// Extents.
    pub fn shape(&self) -> &[i64] {
        shape_of(&self.raw)
    }

    /// Exclusive, as the library writes through what it gets.
    pub(crate) fn as_raw(&mut self) -> &sys::fkv_tensor {
        &self.raw
    }
}

impl fmt::Debug for TensorRef<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorRef({:?}, {:?})", self.dtype(), self.shape())
    }
}

impl fmt::Debug for TensorMut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TensorMut({:?}, {:?})", self.dtype(), self.shape())
    }
}

fn shape_of(raw: &sys::fkv_tensor) -> &[i64] {
    &raw.shape[..crate::convert::count(raw.ndim.into())]
}

fn element_bytes(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F32 => 4,
        _ => 2,
    }
}

/// The library's description of `len` elements at `data`, packed.
fn contiguous(
    data: *mut c_void,
    len: usize,
    dtype: Dtype,
    shape: &[usize],
) -> Result<sys::fkv_tensor> {
    let mut extents = [0i64; MAX_NDIM];
    if shape.is_empty() || shape.len() > MAX_NDIM {
        return Err(Error::invalid(format!(
            "a tensor of {} dimensions",
            shape.len()
        )));
    }
    for (extent, &given) in extents.iter_mut().zip(shape) {
        *extent = int64("shape", given)?;
    }
    let mut raw = sys::fkv_tensor::empty();
    // SAFETY: a struct of the library's size and shape.len() <= 4 extents. `data` is only stored.
    let status = unsafe {
        sys::fkv_tensor_init(
            &mut raw,
            data,
            dtype.to_raw(),
            shape.len() as i32,
            extents.as_ptr(),
        )
    };
    if status != sys::FKV_OK {
        return Err(Error::new(
            Status::from_raw(status),
            format!("a tensor of shape {shape:?}"),
        ));
    }
    if raw.byte_length != (len * element_bytes(dtype)) as u64 {
        return Err(Error::invalid(format!(
            "a slice of {len} elements for a tensor of shape {shape:?}"
        )));
    }
    Ok(raw)
}

/// The same with strides, in elements.
fn strided(
    data: *mut c_void,
    len: usize,
    dtype: Dtype,
    shape: &[usize],
    strides: &[usize],
) -> Result<sys::fkv_tensor> {
    if strides.len() != shape.len() || shape.is_empty() || shape.len() > MAX_NDIM {
        return Err(Error::invalid(format!(
            "{} strides for a tensor of {} dimensions",
            strides.len(),
            shape.len()
        )));
    }
    let too_short = || {
        Error::invalid(format!(
            "a slice of {len} elements for a tensor of shape {shape:?} with strides {strides:?}"
        ))
    };
    let mut raw = sys::fkv_tensor::empty();
    raw.dtype = dtype.to_raw();
    raw.data = data;
    raw.byte_length = (len * element_bytes(dtype)) as u64;
    raw.ndim = shape.len() as i32;
    let mut last = 0usize; // index of the last element
    for (i, (&extent, &stride)) in shape.iter().zip(strides).enumerate() {
        raw.shape[i] = int64("shape", extent)?;
        let bytes = stride
            .checked_mul(element_bytes(dtype))
            .ok_or_else(too_short)?;
        raw.strides[i] = int64("strides", bytes)?;
        let reach = extent.saturating_sub(1).checked_mul(stride);
        last = reach
            .and_then(|r| last.checked_add(r))
            .ok_or_else(too_short)?;
    }
    if !shape.contains(&0) && last >= len {
        return Err(too_short());
    }
    Ok(raw)
}
