// SPDX-License-Identifier: Apache-2.0
//! The header's enumerations. Each has `Unknown` for values of a newer library.
use crate::{convert, sys};
use std::fmt;

macro_rules! codes {
    ($(#[$about:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $constant:ident,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        #[non_exhaustive]
        pub enum $name {
            $($(#[$doc])* $variant,)*
            /// A value that this crate does not know, from a newer library.
            Unknown(i32),
        }

        impl $name {
            /// The enumerator of a C value.
            pub fn from_raw(raw: i32) -> Self {
                $(if raw == sys::$constant as i32 {
                    return Self::$variant;
                })*
                Self::Unknown(raw)
            }

            /// The C value.
            pub fn to_raw(self) -> i32 {
                match self {
                    $(Self::$variant => sys::$constant as i32,)*
                    Self::Unknown(raw) => raw,
                }
            }
        }
    };
}

codes! {
    /// What went wrong.
    Status {
        /// Nothing. No [`Error`](crate::Error) has it.
        Ok = FKV_OK,
        /// An argument is wrong in itself: a count, a shape that does not fit.
        Invalid = FKV_ERR_INVALID,
        /// Of another cache, or not living.
        Handle = FKV_ERR_HANDLE,
        /// A right call at a wrong time: layers of unequal length, solving without observations.
        State = FKV_ERR_STATE,
        /// The allocator has no memory.
        NoMemory = FKV_ERR_NOMEM,
        /// A limit of the context, the cache or the sequence would be exceeded, or a size overflows.
        Limit = FKV_ERR_LIMIT,
        /// NaN or infinity in an input, or a value that the storage type cannot hold.
        NonFinite = FKV_ERR_NONFINITE,
        /// The operating system refused to read or write a file.
        Io = FKV_ERR_IO,
        /// Malformed JSON or contents that contradict themselves.
        Format = FKV_ERR_FORMAT,
        /// Stored contents fail their checksum.
        Checksum = FKV_ERR_CHECKSUM,
        /// A file, module or library of a version that is not known.
        Version = FKV_ERR_VERSION,
        /// Well-formed, but of another model or geometry.
        Mismatch = FKV_ERR_MISMATCH,
        /// Known, but not possible here; or not known to this library.
        Unsupported = FKV_ERR_UNSUPPORTED,
        /// The device failed; what is on it stays unusable.
        Device = FKV_ERR_DEVICE,
        /// Another thread is using the object. Borrowing rules this out for the types of this crate.
        Busy = FKV_ERR_BUSY,
        /// A buffer is too small.
        Buffer = FKV_ERR_BUFFER,
    }
}

impl Status {
    /// The library's name of the status, such as `FKV_ERR_INVALID`.
    pub fn name(self) -> &'static str {
        // SAFETY: any value may be passed; the result is a static text.
        unsafe { convert::static_text(sys::fkv_status_string(self.to_raw())) }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Status::Unknown(raw) => write!(f, "unknown status {raw}"),
            known => f.write_str(known.name()),
        }
    }
}

codes! {
    /// Element types, all little-endian IEEE or bfloat16.
    Dtype {
        /// Not set.
        None = FKV_DTYPE_NONE,
        /// binary32: `f32`.
        F32 = FKV_DTYPE_F32,
        /// binary16: [`F16`](crate::F16).
        F16 = FKV_DTYPE_F16,
        /// bfloat16: [`Bf16`](crate::Bf16).
        Bf16 = FKV_DTYPE_BF16,
    }
}

codes! {
    /// Where a context computes.
    Backend {
        /// The CPU.
        Cpu = FKV_BACKEND_CPU,
        /// A CUDA device.
        Cuda = FKV_BACKEND_CUDA,
    }
}

codes! {
    /// Instruction-set levels of the CPU kernels.
    CpuLevel {
        /// The best level that both the processor and the library have.
        Best = FKV_CPU_BEST,
        /// Portable C.
        Reference = FKV_CPU_REFERENCE,
        /// AVX2, FMA and F16C.
        Avx2 = FKV_CPU_AVX2,
        /// AVX-512 F, BW, DQ and VL.
        Avx512 = FKV_CPU_AVX512,
    }
}

codes! {
    /// Which channels form a RoPE pair.
    RopeLayout {
        /// q and k arrive rotated already, or the model has no RoPE.
        None = FKV_ROPE_NONE,
        /// Channel `j` pairs with `j + rope_dim / 2` (LLaMA in Hugging Face form, Mistral, Qwen).
        HalfSplit = FKV_ROPE_HALF_SPLIT,
        /// Channel `2j` pairs with `2j + 1` (GPT-J, the original LLaMA files).
        Interleaved = FKV_ROPE_INTERLEAVED,
    }
}

codes! {
    /// How time series come back from their Fourier coefficients.
    Restoration {
        /// Least squares.
        LeastSquares = FKV_RESTORE_LEAST_SQUARES,
        /// The published formula, for comparison only.
        Authors = FKV_RESTORE_AUTHORS,
    }
}

codes! {
    /// What happens when the coded middle of a sequence reaches its period.
    Outgrow {
        /// A new segment begins; earlier ones are untouched.
        Segment = FKV_OUTGROW_SEGMENT,
        /// Appending further is [`Status::Limit`].
        Error = FKV_OUTGROW_ERROR,
    }
}

codes! {
    /// Keys or values.
    Part {
        /// Keys.
        K = FKV_PART_K,
        /// Values.
        V = FKV_PART_V,
    }
}

codes! {
    /// How one channel of the middle is held.
    Channel {
        /// Fourier coefficients over time.
        Fourier = FKV_CHANNEL_FOURIER,
        /// Exactly, in the storage type.
        Exact = FKV_CHANNEL_EXACT,
    }
}

codes! {
    /// What a profile does.
    Coding {
        /// Every token and channel exactly.
        Exact = FKV_CODING_EXACT,
        /// A share of the channels as Fourier coefficients.
        Fourier = FKV_CODING_FOURIER,
    }
}

codes! {
    /// What makes a channel cheap to compress.
    Criterion {
        /// Energy of the least-squares residual as stored, weighted by the queries if they are observed.
        Residual = FKV_CRITERION_RESIDUAL,
        /// As published: error of keys before RoPE.
        Published = FKV_CRITERION_PUBLISHED,
    }
}
