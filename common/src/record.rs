//! The record: every durable change of state, as the journal and the stream carry it.
//!
//! A record is a small `head` and, for writes, the `data`. Data is covered by the CRC32C of each of its blocks, which
//! were computed at the client's edge and stay with the block to the disk of the backup; the head, which holds them,
//! is covered by the record's own checksum (see `docs/formats.md`).
