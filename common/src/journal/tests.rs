use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_pcg::Pcg64Mcg;

use super::*;
use crate::{
    checksum::crc32c,
    storage::{
        SimStorage,
        sim::{Fault, OpKind},
    },
};

const STORE: Uid = Uid(*b"a store of tests");
const CONFIG: JournalConfig =
    JournalConfig { capacity_bytes: 64 << 10, file_bytes: 16 << 10, reserve_bytes: 8 << 10, max_batch_bytes: 6 << 10 };

/// A head as callers make it: something unique, and the checksum of the data.
fn record(nonce: u64, len: usize) -> (Bytes, Bytes) {
    let data: Vec<u8> = (0..len as u64).map(|i| (nonce ^ i.wrapping_mul(nonce | 1)).to_le_bytes()[1]).collect();
    let head = [&nonce.to_le_bytes()[..], &crc32c(&data).to_le_bytes()].concat();
    (head.into(), data.into())
}

fn verify(head: &[u8], data: &[u8]) -> bool {
    head.len() == 12 && head[8..] == crc32c(data).to_le_bytes()
}

type Opened = Result<(Journal, Recovered, Vec<RawRecord>), RecoverError>;

fn open_with(sim: &SimStorage, config: JournalConfig, trim: TrimPoint) -> Opened {
    let mut records = Vec::new();
    let (journal, recovered) = Journal::open(Arc::new(sim.clone()), STORE, config, trim, &verify, &mut |r| {
        records.push(r);
        Ok(())
    })?;
    Ok((journal, recovered, records))
}

fn open(sim: &SimStorage) -> (Journal, Recovered, Vec<RawRecord>) {
    open_with(sim, CONFIG, TrimPoint::default()).unwrap()
}

fn commit(journal: &mut Journal) {
    while let Some(batch) = journal.begin_batch() {
        let result = batch.write();
        journal.finish_batch(batch, result).unwrap();
    }
}

fn put(journal: &mut Journal, nonce: u64, len: usize) -> Lsn {
    let (head, data) = record(nonce, len);
    let lsn = journal.append(head, data, Class::Data).unwrap();
    commit(journal);
    lsn
}

fn nonces(records: &[RawRecord]) -> Vec<u64> {
    records.iter().map(|r| u64::from_le_bytes(r.head[..8].try_into().unwrap())).collect()
}

#[test]
fn records_come_back_in_order_across_files() {
    let sim = SimStorage::new(1);
    let (mut journal, recovered, records) = open(&sim);
    assert_eq!((recovered.next_lsn, recovered.epoch, records.len()), (Lsn(1), 1, 0));
    for i in 0..20 {
        assert_eq!(put(&mut journal, i, 1000 + 50 * usize::try_from(i).unwrap()), Lsn(i + 1));
    }
    assert_eq!(journal.durable_lsn(), Lsn(20));
    for epoch in 2..5 {
        let (journal, recovered, records) = open(&sim);
        assert_eq!(nonces(&records), (0..20).collect::<Vec<_>>());
        assert!(records.iter().enumerate().all(|(i, r)| r.lsn.0 == i as u64 + 1));
        assert_eq!((recovered.next_lsn, recovered.epoch, recovered.dropped_bytes), (Lsn(21), epoch, 0));
        assert_eq!(journal.span_bytes(), journal.span_from(Lsn(1)) + SECTOR, "an empty epoch takes no new place");
    }
}

/// Found by the simulation: a sender that had read all, and whose file was then trimmed, was told that what it wanted
/// next had been trimmed too.
#[test]
fn a_reader_that_caught_up_goes_on_when_its_file_is_trimmed() {
    let sim = SimStorage::new(1);
    let (mut journal, ..) = open(&sim);
    put(&mut journal, 1, 2000);
    let mut reader = journal.reader(Lsn(1)).unwrap();
    while journal.files.lock().len() == 1 {
        assert_eq!(reader.read(journal.durable_lsn(), usize::MAX).unwrap().len(), 1);
        put(&mut journal, 2, 2000);
    }
    let next = journal.durable_lsn();
    let point = journal.trim_point_for(next);
    journal.trim(point);
    assert_eq!(journal.files.lock().len(), 1);
    let records = reader.read(next, usize::MAX).unwrap();
    assert_eq!(records.iter().map(|r| r.lsn).collect::<Vec<_>>(), [next]);
}

#[test]
fn a_full_journal_refuses_data_first_and_trimming_gives_files_free() {
    let sim = SimStorage::new(1);
    let (mut journal, ..) = open(&sim);
    let refused = loop {
        let (head, data) = record(1, 2000);
        match journal.append(head, data, Class::Data) {
            Ok(_) => commit(&mut journal),
            Err(e) => break e,
        }
    };
    let AppendError::JournalFull { needed: 2560, capacity: 57344, span } = refused else { panic!("{refused}") };
    assert!(span <= 57344 && span + 2560 > 57344 - 2048, "{span}");
    let mut control = 0;
    while journal.append(Bytes::from(vec![0; 12]), Bytes::new(), Class::Control).is_ok() {
        commit(&mut journal);
        control += 1;
    }
    assert!(control >= 8, "the reserve took {control}");
    assert!(journal.span_bytes() <= journal.capacity_bytes());

    // Even now it opens, and an epoch has a place.
    let all_zero = |head: &[u8], data: &[u8]| verify(head, data) || head == [0; 12];
    let reopen = |trim| Journal::open(Arc::new(sim.clone()), STORE, CONFIG, trim, &all_zero, &mut |_| Ok(()));
    drop(journal);
    let (mut journal, _) = reopen(TrimPoint::default()).unwrap();
    assert!(journal.append(Bytes::from(vec![0; 12]), Bytes::new(), Class::Data).is_err());
    let point = journal.trim_point_for(journal.next_lsn());
    journal.trim(point);
    assert!(journal.span_bytes() <= 2 * CONFIG.file_bytes);
    let names = sim_names(&sim);
    for i in 0..100 {
        put(&mut journal, i, 2000);
        let point = journal.trim_point_for(journal.next_lsn());
        journal.trim(point);
    }
    assert_eq!(sim_names(&sim), names, "files are used again");
    let (next, trim) = (journal.next_lsn(), journal.trim);
    assert_eq!(reopen(trim).unwrap().1.next_lsn, next);
    assert!(matches!(reopen(TrimPoint::default()), Err(RecoverError::Corrupt { .. })), "the first file is gone");
}

fn sim_names(sim: &SimStorage) -> Vec<String> {
    sim.list(slot::DIR).unwrap()
}

#[test]
fn a_record_longer_than_a_file_is_refused() {
    let sim = SimStorage::new(1);
    let (mut journal, ..) = open(&sim);
    let (head, data) = record(1, 15_872 - 64 - 20 - 12 + 1);
    let refused = journal.append(head, data, Class::Data).unwrap_err();
    assert_eq!(refused, AppendError::TooLarge { bytes: 16_384, limit: 15_872 });
    put(&mut journal, 1, 15_872 - 64 - 20 - 12);
    assert_eq!(open(&sim).2.len(), 1);
}

#[test]
fn two_batches_are_written_in_any_order_and_finished_in_theirs() {
    let sim = SimStorage::new(1);
    let (mut journal, ..) = open(&sim);
    for i in 0..12 {
        let (head, data) = record(i, 2500);
        journal.append(head, data, Class::Data).unwrap();
    }
    let (first, second) = (journal.begin_batch().unwrap(), journal.begin_batch().unwrap());
    assert!(journal.begin_batch().is_none(), "two in flight");
    assert_eq!((first.lsns(), second.lsns()), (Lsn(1)..=Lsn(2), Lsn(3)..=Lsn(4)));
    let written = second.write();
    let result = first.write();
    assert_eq!(journal.finish_batch(first, result).unwrap(), Lsn(2));
    assert_eq!(journal.finish_batch(second, written).unwrap(), Lsn(4));
    commit(&mut journal);
    assert_eq!((journal.durable_lsn(), journal.queued_bytes()), (Lsn(12), 0));
}

#[test]
fn a_failed_sync_poisons_the_journal_and_both_batches() {
    let sim = SimStorage::new(1);
    let (mut journal, ..) = open(&sim);
    put(&mut journal, 0, 100);
    for i in 1..6 {
        let (head, data) = record(i, 2500);
        journal.append(head, data, Class::Data).unwrap();
    }
    let (first, second) = (journal.begin_batch().unwrap(), journal.begin_batch().unwrap());
    sim.fail_nth(OpKind::Sync, 1, Fault::EIO);
    let late = second.write();
    assert!(late.is_err());
    let early = first.write();
    assert!(early.is_err(), "a sync after a failed one proves nothing");
    assert!(journal.finish_batch(first, early).is_err());
    assert!(journal.finish_batch(second, late).is_err());
    assert!(journal.begin_batch().is_none());
    let (head, data) = record(9, 1);
    assert!(matches!(journal.append(head, data, Class::Control), Err(AppendError::Failed(_))));
    assert_eq!(journal.durable_lsn(), Lsn(1));
}

#[test]
fn what_a_failed_sync_left_in_the_cache_is_written_again_before_it_counts() {
    for seed in 0..50 {
        let sim = SimStorage::new(seed);
        let (mut journal, ..) = open(&sim);
        put(&mut journal, 0, 100);
        let (head, data) = record(1, 2500);
        journal.append(head, data, Class::Data).unwrap();
        let batch = journal.begin_batch().unwrap();
        sim.fail_nth(OpKind::Sync, 1, Fault::EIO);
        assert!(batch.write().is_err());
        // The process restarts, the power stays: the cache shows the record, the disk does not have it.
        let (_, recovered, _) = open(&sim);
        sim.crash(&mut Pcg64Mcg::seed_from_u64(seed));
        let (_, after, _) = open(&sim);
        assert_eq!(after.next_lsn, recovered.next_lsn);
    }
}

#[test]
fn a_reader_follows_and_notices_trimming() {
    let sim = SimStorage::new(1);
    let (mut journal, ..) = open(&sim);
    for i in 0..5 {
        put(&mut journal, i, 3000);
    }
    drop(journal);
    let (mut journal, ..) = open(&sim);
    for i in 5..12 {
        put(&mut journal, i, 3000);
    }
    let mut reader = journal.reader(Lsn(3)).unwrap();
    assert_eq!(nonces(&reader.read(Lsn(4), usize::MAX).unwrap()), [2, 3]);
    assert_eq!(nonces(&reader.read(Lsn(12), 3001).unwrap()), [4]);
    assert_eq!(nonces(&reader.read(Lsn(12), usize::MAX).unwrap()), (5..12).collect::<Vec<_>>());
    assert!(reader.read(Lsn(12), usize::MAX).unwrap().is_empty());
    put(&mut journal, 12, 0);
    assert_eq!(nonces(&reader.read(journal.durable_lsn(), usize::MAX).unwrap()), [12]);

    let mut late = journal.reader(Lsn(1)).unwrap();
    assert!(journal.span_from(Lsn(1)) > journal.span_from(Lsn(12)));
    let point = journal.trim_point_for(Lsn(12));
    journal.trim(point);
    assert!(matches!(late.read(Lsn(12), 1), Err(ReadError::Trimmed { lsn: Lsn(1), .. })));
    assert!(matches!(journal.reader(Lsn(1)), Err(ReadError::Trimmed { .. })));
    assert_eq!(nonces(&journal.reader(Lsn(12)).unwrap().read(Lsn(13), usize::MAX).unwrap()), [11, 12]);
}

#[test]
fn a_foreign_journal_is_refused() {
    let sim = SimStorage::new(1);
    open(&sim);
    let other = Uid(*b"some other store");
    let opened =
        Journal::open(Arc::new(sim), other, CONFIG, TrimPoint::default(), &verify, &mut |_| Ok(())).map(|_| ());
    let message = opened.unwrap_err().to_string();
    assert!(message.contains("journal/00000000 belongs to store"), "{message}");
}

#[test]
fn sizes_may_change_between_openings() {
    let sim = SimStorage::new(1);
    let (mut journal, ..) = open(&sim);
    for i in 0..10 {
        put(&mut journal, i, 3000);
    }
    let larger = JournalConfig { file_bytes: 32 << 10, capacity_bytes: 256 << 10, ..CONFIG };
    let (mut journal, _, records) = open_with(&sim, larger, TrimPoint::default()).unwrap();
    assert_eq!(records.len(), 10);
    for i in 10..30 {
        put(&mut journal, i, 3000);
    }
    let smaller = JournalConfig { file_bytes: 8 << 10, ..CONFIG };
    let (journal, _, records) = open_with(&sim, smaller, TrimPoint::default()).unwrap();
    assert_eq!(nonces(&records), (0..30).collect::<Vec<_>>());
    assert!(journal.span_bytes() > journal.capacity_bytes());
}

/// A small journal with several files, epochs and batches, and the LSN that its last batch proves durable.
fn small_journal() -> (SimStorage, JournalConfig, Vec<u64>, u64) {
    let sim = SimStorage::new(7);
    let config = JournalConfig { file_bytes: 4096, capacity_bytes: 8 * 4096, reserve_bytes: 0, max_batch_bytes: 2048 };
    let mut nonce = 0;
    for _ in 0..3 {
        let (mut journal, ..) = open_with(&sim, config, TrimPoint::default()).unwrap();
        for len in [10, 700, 1500] {
            nonce += 1;
            put(&mut journal, nonce, len);
        }
    }
    (sim, config, (1..=nonce).collect(), nonce - 1)
}

/// Opens a copy with one changed byte: an error, or a prefix that holds everything proven.
fn check_flip(sim: &SimStorage, config: JournalConfig, all: &[u64], proven: u64) -> Result<bool, String> {
    match open_with(sim, config, TrimPoint::default()) {
        Err(RecoverError::Corrupt { .. }) => Ok(true),
        Err(e) => Err(e.to_string()),
        Ok((.., records)) => {
            let found = nonces(&records);
            if !all.starts_with(&found) {
                return Err(format!("wrong records {found:?}"));
            }
            if (found.len() as u64) < proven { Err(format!("{} of {proven}", found.len())) } else { Ok(false) }
        }
    }
}

fn flip_every_byte() -> Result<u32, String> {
    let (sim, config, all, proven) = small_journal();
    let mut detected = 0;
    for name in sim_names(&sim) {
        let name = format!("{}/{name}", slot::DIR);
        for offset in 0..4096 {
            let copy = sim.fork();
            copy.corrupt(&name, offset, 1 << (offset % 8));
            let found = check_flip(&copy, config, &all, proven).map_err(|e| format!("{name} byte {offset}: {e}"))?;
            detected += u32::from(found);
        }
    }
    Ok(detected)
}

#[test]
fn every_flipped_byte_is_detected_or_harmless() {
    let detected = flip_every_byte().unwrap();
    assert!(detected > 5000, "{detected}");
}

#[test]
fn a_flip_below_the_trim_point_is_harmless_and_above_it_is_not_hidden() {
    let (sim, config, all, proven) = small_journal();
    let (mut journal, ..) = open_with(&sim, config, TrimPoint::default()).unwrap();
    let trim = journal.trim_point_for(Lsn(proven));
    journal.trim(trim);
    drop(journal);
    let first = usize::try_from(proven).unwrap() - 1;
    let mut refused = 0;
    for name in sim_names(&sim) {
        for offset in 0..4096 {
            let copy = sim.fork();
            copy.corrupt(&format!("{}/{name}", slot::DIR), offset, 0x10);
            match open_with(&copy, config, trim) {
                // The last opening proved every record.
                Ok((.., records)) => assert_eq!(nonces(&records), all[first..], "{name} byte {offset}"),
                Err(e) => {
                    assert!(matches!(e, RecoverError::Corrupt { .. }), "{name} byte {offset}: {e}");
                    refused += 1;
                }
            }
        }
    }
    assert!((500..4096).contains(&refused), "{refused}");
}

#[test]
fn corruption_is_reported_with_file_offset_and_lsn() {
    let (sim, config, ..) = small_journal();
    sim.corrupt("journal/00000000", 1024 + 64 + 20 + 3, 1);
    let opened = open_with(&sim, config, TrimPoint::default()).map(|_| ());
    let Err(RecoverError::Corrupt { file, offset: 1024, lsn: Lsn(1), evidence }) = opened else { panic!("{opened:?}") };
    assert_eq!(file, "journal/00000000");
    assert!(evidence.contains("was durable"), "{evidence}");
}

#[test]
fn a_missing_file_is_corruption() {
    for name in ["journal/00000000", "journal/00000001"] {
        let (sim, config, ..) = small_journal();
        sim.remove(name).unwrap();
        let opened = open_with(&sim, config, TrimPoint::default()).map(|_| ());
        assert!(matches!(opened, Err(RecoverError::Corrupt { .. })), "{opened:?}");
    }
}

#[derive(Debug, Clone)]
enum Step {
    Append(usize, bool),
    Commit,
    Trim(u8),
    Reopen,
    Read(u8),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        8 => (0..6000usize, any::<bool>()).prop_map(|(n, control)| Step::Append(n, control)),
        4 => Just(Step::Commit),
        2 => any::<u8>().prop_map(Step::Trim),
        1 => Just(Step::Reopen),
        2 => any::<u8>().prop_map(Step::Read),
    ];
    prop::collection::vec(step, 1..80)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Without faults the journal is a vector from which checkpoints cut the front.
    #[test]
    fn agrees_with_a_vector(steps in steps()) {
        let sim = SimStorage::new(1);
        let (mut journal, ..) = open(&sim);
        let mut model: Vec<(Bytes, Bytes)> = Vec::new();
        let mut durable = 0;
        let mut trim = TrimPoint::default();
        for step in steps {
            match step {
                Step::Append(len, control) => {
                    let (head, data) = record(model.len() as u64, len);
                    let class = if control { Class::Control } else { Class::Data };
                    if let Ok(lsn) = journal.append(head.clone(), data.clone(), class) {
                        model.push((head, data));
                        prop_assert_eq!(lsn.0, model.len() as u64);
                    }
                    // The start of an epoch may take a file of its own.
                    prop_assert!(journal.span_bytes() <= journal.capacity_bytes() + 2 * SECTOR);
                }
                Step::Commit => {
                    commit(&mut journal);
                    if let Some(preparation) = journal.prepare_next_file() {
                        preparation.run().unwrap();
                    }
                    durable = model.len();
                }
                Step::Trim(share) => {
                    let lsn = Lsn(trim.lsn.0 + (durable as u64 + 1 - trim.lsn.0) * u64::from(share) / 255);
                    trim = journal.trim_point_for(lsn);
                    journal.trim(trim);
                }
                Step::Reopen => {
                    let (again, recovered, records) = open_with(&sim, CONFIG, trim).unwrap();
                    journal = again;
                    model.truncate(durable);
                    prop_assert_eq!(recovered.next_lsn.0, durable as u64 + 1);
                    let from = usize::try_from(trim.lsn.0.max(1) - 1).unwrap();
                    prop_assert_eq!(records.len(), durable - from);
                    for (r, (head, data)) in records.iter().zip(&model[from..]) {
                        prop_assert!(r.head == head && r.data == data);
                    }
                }
                Step::Read(share) => {
                    let from = trim.lsn.0.max(1) + (durable as u64 + 1 - trim.lsn.0.max(1)) * u64::from(share) / 255;
                    let mut reader = journal.reader(Lsn(from)).unwrap();
                    let mut at = usize::try_from(from - 1).unwrap();
                    loop {
                        let records = reader.read(journal.durable_lsn(), 5000).unwrap();
                        if records.is_empty() {
                            break;
                        }
                        for r in records {
                            prop_assert!(r.head == model[at].0 && r.data == model[at].1);
                            at += 1;
                        }
                    }
                    prop_assert_eq!(at, durable);
                }
            }
        }
    }
}

/// Several lives of one journal, each ended by a crash, a failed call or a plain restart, with checks at each opening.
fn lives(seed: u64) -> Result<u64, String> {
    let mut rng = Pcg64Mcg::seed_from_u64(seed);
    let sim = SimStorage::new(seed);
    let (mut log, mut acked, mut trim) = (Vec::<u64>::new(), 0usize, TrimPoint::default());
    let mut nonce = seed << 20;
    let file_bytes = [4096, 16 << 10][rng.random_range(0..2)];
    let max_batch_bytes = [1, 2048, 6 << 10, 1 << 20][rng.random_range(0..4)];
    let config = JournalConfig { file_bytes, max_batch_bytes, ..CONFIG };
    for _ in 0..rng.random_range(2..7) {
        // The plan may hit inside the opening, which is then tried again.
        match rng.random_range(0..6) {
            0 => sim.fail_nth(OpKind::Sync, rng.random_range(1..12), Fault::EIO),
            1 => sim.fail_nth(OpKind::Write, rng.random_range(1..12), Fault::ENOSPC),
            2 => {}
            _ => sim.crash_after(rng.random_range(1..40)),
        }
        let opened = open_with(&sim, config, trim);
        let (mut journal, _, records) = match opened {
            Ok(opened) => opened,
            Err(RecoverError::Io { .. }) => {
                if sim.has_crashed() || rng.random() {
                    sim.crash(&mut rng);
                }
                continue;
            }
            Err(e) => return Err(e.to_string()),
        };
        let from = usize::try_from(trim.lsn.0.max(1) - 1).map_err(|e| e.to_string())?;
        let end = from + records.len();
        if end < acked || end > log.len() || nonces(&records) != log[from..end] {
            return Err(format!("{:?} from {from}, acked {acked} of {log:?}", nonces(&records)));
        }
        log.truncate(end);
        // What recovery served must not be lost by the next crash.
        acked = end;
        let mut flying: VecDeque<(Batch, Option<io::Result<()>>)> = VecDeque::new();
        for _ in 0..rng.random_range(0..40) {
            match rng.random_range(0..8) {
                0..=2 => {
                    nonce += 1;
                    let len = [100, 100, 100, 900, 3000][rng.random_range(0..5)];
                    let (head, data) = record(nonce, len);
                    if journal.append(head, data, Class::Data).is_ok() {
                        log.push(nonce);
                    }
                }
                3 => flying.extend(journal.begin_batch().map(|b| (b, None))),
                4 => {
                    let unwritten = flying.iter_mut().filter(|(_, r)| r.is_none());
                    // Either of the two may reach the disk first.
                    let pick = if rng.random() { unwritten.last() } else { unwritten.take(1).last() };
                    if let Some((batch, result)) = pick {
                        *result = Some(batch.write());
                    }
                }
                5 | 6 => {
                    if let Some((batch, Some(result))) = flying.pop_front_if(|(_, r)| r.is_some())
                        && let Ok(durable) = journal.finish_batch(batch, result)
                    {
                        acked = acked.max(usize::try_from(durable.0).map_err(|e| e.to_string())?);
                    }
                }
                _ if rng.random_range(0..3) == 0 => {
                    let lsn = Lsn(trim.lsn.0 + rng.random_range(0..=(acked as u64 + 1).saturating_sub(trim.lsn.0)));
                    trim = journal.trim_point_for(lsn);
                    journal.trim(trim);
                }
                _ => {
                    if let Some(preparation) = journal.prepare_next_file() {
                        _ = preparation.run();
                    }
                }
            }
        }
        if sim.has_crashed() || rng.random() {
            sim.crash(&mut rng);
        }
    }
    sim.clear_faults();
    Ok(sim.ops())
}

/// `JOURNAL_SEEDS=1000000` runs for longer.
#[test]
fn acknowledged_records_survive_every_crash() {
    let seeds = std::env::var("JOURNAL_SEEDS").map_or(6000, |n| n.parse().unwrap());
    for seed in 0..seeds {
        if let Err(e) = lives(seed) {
            panic!("seed {seed}: {e}");
        }
    }
}

#[test]
fn a_seed_is_a_run() {
    for seed in 0..20 {
        assert_eq!(lives(seed), lives(seed));
    }
}

#[cfg(feature = "mutants")]
mod mutants {
    use super::*;
    use crate::mutant::activate;

    fn first_failing_seed(mutant: Mutant) -> Option<u64> {
        activate(Some(mutant));
        let seed = (0..5000).find(|seed| lives(*seed).is_err());
        activate(None);
        seed
    }

    #[test]
    fn each_is_caught() {
        for mutant in [Mutant::NoNewEpoch, Mutant::NoDirectorySync, Mutant::IgnoreFailedSync, Mutant::TrimTooEarly] {
            let seed = first_failing_seed(mutant);
            assert!(seed.is_some(), "{mutant:?} survives");
            println!("{mutant:?}: seed {seed:?}");
        }
    }

    #[test]
    fn corruption_taken_for_a_torn_tail_is_caught() {
        activate(Some(Mutant::CorruptionIsTornTail));
        let flips = flip_every_byte();
        activate(None);
        assert!(flips.is_err());
    }
}
