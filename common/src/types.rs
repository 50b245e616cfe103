//! The units and identities of the domain. A number with a unit or an identity is a type of its own.

use std::fmt;

use serde::{Deserialize, Serialize};

macro_rules! id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
        pub struct $name(pub u64);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

id!(
    /// A virtual disk. Never reused; 0 is none.
    VolumeId
);
id!(
    /// Volumes that switch, cut and promote together. A volume alone is its own group. Never reused; 0 is none.
    GroupId
);
id!(
    /// One layer of a volume's images: the head or a snapshot. Never reused; 0 is none.
    LayerId
);
id!(
    /// A snapshot for users, of the volumes of a group. The same on both sides. Never reused; 0 is none.
    SnapshotId
);
id!(
    /// Place of a record in its node's journal. Node-wide, only grows. 0 stands before the first record.
    Lsn
);

impl Lsn {
    /// Before the first record.
    pub const ZERO: Self = Self(0);
    /// Behind every record.
    pub const MAX: Self = Self(u64::MAX);

    /// The place behind this one.
    #[must_use]
    pub fn next(self) -> Self {
        Self(self.0 + 1)
    }
}

/// A place in the history of a group: generations first, then LSNs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Position {
    /// Number of the ownership of the pair.
    pub generation: u64,
    /// Place in the journal of the primary of that generation.
    pub lsn: Lsn,
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.generation, self.lsn)
    }
}

/// Size of a block: 512 B to 64 KiB, a power of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct BlockSize(u32);

impl BlockSize {
    /// 512 B.
    pub const MIN: u32 = 512;
    /// 64 KiB.
    pub const MAX: u32 = 64 * 1024;

    /// `None` unless `bytes` is a power of two from 512 to 65536.
    #[must_use]
    pub fn new(bytes: u32) -> Option<Self> {
        (bytes.is_power_of_two() && (Self::MIN..=Self::MAX).contains(&bytes)).then_some(Self(bytes))
    }

    /// In bytes.
    #[must_use]
    pub fn bytes(self) -> u32 {
        self.0
    }
}

/// When a write is acknowledged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AckRule {
    /// Durable in the journal (Fig. 3).
    Staged,
    /// As `Staged`, and written in its place and synced.
    Primary,
    /// Durable on both sides (synchronous form).
    Both,
}

/// What a [`AckRule::Both`] volume does while the backup is away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AwayRule {
    /// Go on without the backup.
    Degrade,
    /// Refuse and hold writes.
    Block,
}

/// What a volume is. The same on both sides.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VolumeSpec {
    /// Never reused.
    pub id: VolumeId,
    /// Unique among live volumes.
    pub name: String,
    /// The group it belongs to.
    pub group: GroupId,
    /// Name of that group.
    pub group_name: String,
    /// In bytes, a multiple of the block size.
    pub size_bytes: u64,
    /// Unit of addressing, ownership and checksums.
    pub block_size: BlockSize,
    /// Unit of physical allocation, in bytes.
    pub segment_bytes: u32,
    /// When writes are acknowledged.
    pub ack: AckRule,
    /// What happens to them while the backup is away.
    pub away: AwayRule,
}

impl VolumeSpec {
    /// Size in blocks.
    #[must_use]
    pub fn block_count(&self) -> u64 {
        self.size_bytes / u64::from(self.block_size.bytes())
    }

    /// Blocks in one segment: 1 to 128.
    #[must_use]
    pub fn blocks_per_segment(&self) -> u32 {
        self.segment_bytes / self.block_size.bytes()
    }
}

/// A range of blocks of one volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockRange {
    /// The volume.
    pub volume: VolumeId,
    /// Its first block.
    pub first: u64,
    /// How many.
    pub count: u64,
}

impl BlockRange {
    /// One behind the last block.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.first + self.count
    }
}

/// A random identity of 16 bytes: of a pair, a data directory, a generation or a session.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct Uid(pub [u8; 16]);

impl Uid {
    /// `None` unless `bytes` are 16.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// All zeros: not set.
    #[must_use]
    pub fn is_nil(&self) -> bool {
        self.0 == [0; 16]
    }
}

impl fmt::Display for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|b| write!(f, "{b:02x}"))
    }
}

impl fmt::Debug for Uid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A physical segment: a device of the pool and the segment's number on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct SegmentId(pub u64);

impl SegmentId {
    /// Segment `index` (below 2^48) of `device`.
    #[must_use]
    pub fn new(device: u16, index: u64) -> Self {
        debug_assert!(index < 1 << 48);
        Self(u64::from(device) << 48 | index)
    }

    /// The device's number in the pool.
    #[must_use]
    #[allow(clippy::cast_possible_truncation, reason = "the upper 16 bits")]
    pub fn device(self) -> u16 {
        (self.0 >> 48) as u16
    }

    /// The segment's number on its device.
    #[must_use]
    pub fn index(self) -> u64 {
        self.0 & ((1 << 48) - 1)
    }
}
