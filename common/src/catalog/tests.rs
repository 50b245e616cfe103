use super::*;
use crate::pool::testing::MemStorage;

fn set(catalog: &Catalog, value: &[u8]) -> Result<(), CatalogError> {
    catalog.write(|txn| txn.put_meta("name", value))
}

#[test]
fn committed_values_survive_reopening_and_discarded_ones_do_not() {
    let storage = MemStorage::new();
    {
        let catalog = Catalog::open(&*storage, 1 << 20).unwrap();
        assert_eq!(catalog.read().unwrap().meta("name").unwrap(), None);
        set(&catalog, b"one").unwrap();
        let refused: Result<(), CatalogError> = catalog.write(|txn| {
            txn.put_meta("name", b"two")?;
            Err(CatalogError::Poisoned)
        });
        assert!(refused.is_err());
    }
    let catalog = Catalog::open(&*storage, 1 << 20).unwrap();
    assert_eq!(catalog.read().unwrap().meta("name").unwrap().unwrap(), b"one");
}

#[test]
fn a_view_does_not_see_later_commits() {
    let catalog = Catalog::open(&*MemStorage::new(), 1 << 20).unwrap();
    set(&catalog, b"one").unwrap();
    let view = catalog.read().unwrap();
    set(&catalog, b"two").unwrap();
    assert_eq!(view.meta("name").unwrap().unwrap(), b"one");
    assert_eq!(catalog.read().unwrap().meta_with_prefix("na").unwrap(), [("name".to_owned(), b"two".to_vec())]);
    assert!(catalog.read().unwrap().meta_with_prefix("nb").unwrap().is_empty());
}

#[test]
fn a_failed_sync_poisons_the_catalogue() {
    let storage = MemStorage::new();
    let catalog = Catalog::open(&*storage, 1 << 20).unwrap();
    set(&catalog, b"one").unwrap();
    storage.fail_syncs(true);
    assert!(set(&catalog, b"two").is_err());
    storage.fail_syncs(false);
    assert!(catalog.is_poisoned());
    assert!(matches!(set(&catalog, b"three"), Err(CatalogError::Poisoned)));
    assert!(matches!(catalog.read(), Err(CatalogError::Poisoned)));
    drop(catalog);
    let catalog = Catalog::open(&*storage, 1 << 20).unwrap();
    let found = catalog.read().unwrap().meta("name").unwrap().unwrap();
    assert!(found == b"one" || found == b"two", "one of the two commits, whole");
}
