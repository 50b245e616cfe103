//! A thin wrapper around tonic's prost codec that only sets buffer sizes.
//!
//! On a stream many small messages leave in one write when the encoder may fill a large buffer before it yields; with
//! the default of 8 KiB, a stream of 4 KiB writes costs a write to the socket for every other message. All others get
//! buffers that grow to the one message they hold: a payload is a slice of the buffer it arrived in, and keeps all of
//! it in memory for as long as the payload lives.

use std::{any::TypeId, marker::PhantomData};

use prost::Message;
use tonic::codec::{BufferSettings, Codec};
use tonic_prost::{ProstCodec, ProstDecoder, ProstEncoder};

use crate::v1;

/// Bytes that are buffered before the encoder hands them to the transport.
const BUFFER_BYTES: usize = 128 * 1024;
/// First size of the buffer for a single message: its fields without the payload.
const MESSAGE_BYTES: usize = 512;

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
        let first = if is_streamed::<T>() { BUFFER_BYTES } else { MESSAGE_BYTES };
        ProstCodec::<T, U>::raw_encoder(BufferSettings::new(first, BUFFER_BYTES))
    }

    fn decoder(&mut self) -> Self::Decoder {
        // Nothing ahead: the buffer grows to the frame that comes.
        ProstCodec::<T, U>::raw_decoder(BufferSettings::new(0, BUFFER_BYTES))
    }
}

/// True for what is sent many at a time.
fn is_streamed<T: 'static>() -> bool {
    [TypeId::of::<v1::WriteBlocksRequest>(), TypeId::of::<v1::StagedRecord>(), TypeId::of::<v1::ReadBlocksResponse>()]
        .contains(&TypeId::of::<T>())
}
