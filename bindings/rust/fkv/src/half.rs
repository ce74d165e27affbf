// SPDX-License-Identifier: Apache-2.0
//! The 16-bit element types, as bits. For arithmetic use a crate made for it, and hand its bits over.

macro_rules! bits {
    ($(#[$about:meta])* $name:ident) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        #[repr(transparent)]
        pub struct $name(pub u16);

        impl $name {
            /// A view of the same memory as this type.
            pub fn from_bits(bits: &[u16]) -> &[Self] {
                // SAFETY: #[repr(transparent)] over u16, of which every value is valid.
                unsafe { std::slice::from_raw_parts(bits.as_ptr().cast(), bits.len()) }
            }

            /// A view of the same memory as this type.
            pub fn from_bits_mut(bits: &mut [u16]) -> &mut [Self] {
                // SAFETY: as from_bits; the exclusive borrow is passed on.
                unsafe { std::slice::from_raw_parts_mut(bits.as_mut_ptr().cast(), bits.len()) }
            }
        }
    };
}

bits! {
    /// IEEE binary16, as bits.
    ///
    /// ```
    /// use fkv::F16;
    /// assert_eq!(F16::from_f32(1.5), F16(0x3e00));
    /// assert_eq!(F16(0x3e00).to_f32(), 1.5);
    /// let memory = [0x3c00u16, 0xc000];
    /// assert_eq!(F16::from_bits(&memory)[1].to_f32(), -2.0);
    /// ```
    F16
}

bits! {
    /// bfloat16, as bits: the upper half of an `f32`.
    ///
    /// ```
    /// use fkv::Bf16;
    /// assert_eq!(Bf16::from_f32(1.5), Bf16(0x3fc0));
    /// assert_eq!(Bf16(0x3fc0).to_f32(), 1.5);
    /// ```
    Bf16
}

/// Drops `shift` low bits, rounding to nearest, ties to even. A carry runs on into the upper bits, which
/// for floating-point patterns is the next binade, or infinity.
fn round_off(value: u32, shift: u32) -> u32 {
    let half = 1u32 << (shift - 1);
    let odd = (value >> shift) & 1;
    (value + (half - 1) + odd) >> shift
}

impl F16 {
    /// The nearest value; ties to even, beyond the range infinity.
    pub fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        let sign = (bits >> 16) as u16 & 0x8000;
        let magnitude = bits & 0x7fff_ffff;
        let rounded = if magnitude > 0x7f80_0000 {
            0x7e00 | (magnitude >> 13) & 0x3ff // NaN, made quiet
        } else if magnitude >= 0x4780_0000 {
            0x7c00 // 2^16 and more
        } else if magnitude >= 0x3880_0000 {
            round_off(magnitude - (112 << 23), 13) // the exponent's bias is 15 instead of 127
        } else {
            // Below 2^-14 the unit is 2^-24: the place of the significand's last bit at exponent 126.
            // At exponent 101 all are below half a unit, and so is everything smaller.
            let shift = 126 - (magnitude >> 23).max(101);
            round_off((magnitude & 0x7f_ffff) | 0x80_0000, shift)
        };
        F16(sign | rounded as u16)
    }

    /// The same value.
    pub fn to_f32(self) -> f32 {
        let sign = u32::from(self.0 & 0x8000) << 16;
        let magnitude = u32::from(self.0 & 0x7fff);
        let bits = match magnitude >> 10 {
            0 => (magnitude as f32 * 2f32.powi(-24)).to_bits(),
            31 => 0x7f80_0000 | magnitude << 13,
            _ => (magnitude << 13) + (112 << 23),
        };
        f32::from_bits(sign | bits)
    }
}

impl Bf16 {
    /// The nearest value; ties to even.
    pub fn from_f32(value: f32) -> Self {
        let bits = value.to_bits();
        if value.is_nan() {
            return Bf16((bits >> 16) as u16 | 0x40); // stays NaN, made quiet
        }
        Bf16(round_off(bits, 16) as u16)
    }

    /// The same value.
    pub fn to_f32(self) -> f32 {
        f32::from_bits(u32::from(self.0) << 16)
    }
}
