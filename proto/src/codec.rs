//! A thin wrapper around tonic's prost codec that only sets buffer sizes.
//!
//! Many small messages leave in one write when the encoder may fill a large buffer before it yields; with the default
//! of 8 KiB, a stream of 4 KiB writes costs a write to the socket for every other message.

use std::marker::PhantomData;

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

/// Bytes that are buffered before the encoder hands them to the transport.
const BUFFER_BYTES: usize = 128 * 1024;

/// The codec of every Understudy service.
#[derive(Debug, Clone)]
pub struct BlockCodec<T, U>(PhantomData<(T, U)>);

impl<T, U> Default for BlockCodec<T, U> {
    fn default() -> Self {
        Self(PhantomData)
    }
}

impl<T, U> Codec for BlockCodec<T, U>
where
    T: Message + Send + 'static,
    U: Message + Default + Send + 'static,
{
    type Encode = T;
    type Decode = U;
    type Encoder = ProstEncoder<T>;
    type Decoder = ProstDecoder<U>;

    fn encoder(&mut self) -> Self::Encoder {
        ProstCodec::<T, U>::raw_encoder(settings())
    }

    fn decoder(&mut self) -> Self::Decoder {
        ProstCodec::<T, U>::raw_decoder(settings())
    }
}

fn settings() -> BufferSettings {
    BufferSettings::new(BUFFER_BYTES, BUFFER_BYTES)
}
