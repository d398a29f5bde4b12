//! Services and EndpointSlices by Service, since every question is about one Service with its slices:
//! answering it is one look-up, and going through all of them none.
//!
//! There are tens of thousands, so that what is kept for each decides how much memory the program
//! takes: lists are no longer than what is in them, and a name is stored once.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use crate::contribution::PortSlots;
use crate::model::{EndpointSlice, NamespacedName, Service};

/// An object and the listing that named it last.
#[derive(Clone, Debug)]
pub(super) struct Known<T> {
    pub(super) object: T,
    pub(super) listing: u32,
}

/// What there is under the name of a Service. A slice can arrive before its Service.
#[derive(Clone, Debug, Default)]
pub(super) struct Holding {
    pub(super) service: Option<Known<Service>>,
    /// Sorted by name.
    slices: Vec<Known<EndpointSlice>>,
    /// The numbering of its backends, as of the last contribution.
    pub(super) slots: PortSlots,
}

impl Holding {
    pub(super) fn slices(&self) -> Vec<&EndpointSlice> {
        self.slices.iter().map(|known| &known.object).collect()
    }

    fn find(&self, slice: &NamespacedName) -> Result<usize, usize> {
        self.slices.binary_search_by(|known| known.object.name.cmp(slice))
    }
}

/// All of them. A copy shares what is under each name until one side changes it, so that it costs
/// little and takes little memory.
#[derive(Clone, Debug, Default)]
pub(super) struct Objects {
    by_service: BTreeMap<NamespacedName, Arc<Holding>>,
    /// The Service of every slice.
    owners: HashMap<NamespacedName, NamespacedName>,
    services: usize,
}

impl Objects {
    /// How many Services there are.
    pub(super) fn service_count(&self) -> usize {
        self.services
    }

    /// How many slices there are.
    pub(super) fn slice_count(&self) -> usize {
        self.owners.len()
    }

    /// What there is under the name of a Service.
    pub(super) fn holding(&mut self, name: &NamespacedName) -> Option<&mut Holding> {
        self.by_service.get_mut(name).map(Arc::make_mut)
    }

    /// Every Service by name, with its slices.
    pub(super) fn services(&self) -> impl Iterator<Item = (&NamespacedName, &Holding, &Service)> {
        self.by_service.iter().filter_map(|(name, holding)| {
            Some((name, &**holding, &holding.service.as_ref()?.object))
        })
    }

    /// The same, to be changed.
    pub(super) fn holdings(&mut self) -> impl Iterator<Item = (&NamespacedName, &mut Holding)> {
        self.by_service.iter_mut().map(|(name, holding)| (name, Arc::make_mut(holding)))
    }

    /// Every slice.
    pub(super) fn slices(&self) -> impl Iterator<Item = &EndpointSlice> {
        self.by_service.values().flat_map(|holding| &holding.slices).map(|known| &known.object)
    }

    pub(super) fn service(&self, name: &NamespacedName) -> Option<(&Holding, &Service)> {
        let holding = self.by_service.get(name)?;
        Some((holding, &holding.service.as_ref()?.object))
    }

    /// The listing that named a Service last, to be changed.
    pub(super) fn service_listing(&mut self, name: &NamespacedName) -> Option<&mut u32> {
        self.holding(name)?.service.as_mut().map(|known| &mut known.listing)
    }

    /// The same for a slice.
    pub(super) fn slice_listing(&mut self, name: &NamespacedName) -> Option<&mut u32> {
        self.slice_mut(name).map(|known| &mut known.listing)
    }

    fn slice_mut(&mut self, name: &NamespacedName) -> Option<&mut Known<EndpointSlice>> {
        let holding = Arc::make_mut(self.by_service.get_mut(self.owners.get(name)?)?);
        let index = holding.find(name).ok()?;
        holding.slices.get_mut(index)
    }

    /// A known slice.
    pub(super) fn slice(&self, name: &NamespacedName) -> Option<&EndpointSlice> {
        let holding = self.by_service.get(self.owners.get(name)?)?;
        Some(&holding.slices[holding.find(name).ok()?].object)
    }

    pub(super) fn put_service(&mut self, mut service: Service, listing: u32) {
        let name = self.interned(&service.name);
        service.name = name.clone();
        let holding = Arc::make_mut(self.by_service.entry(name).or_default());
        let before = holding.service.replace(Known { object: service, listing });
        self.services += usize::from(before.is_none());
    }

    /// Puts a slice in the place of the one of its name, which must not belong to another Service.
    pub(super) fn put_slice(&mut self, mut slice: EndpointSlice, listing: u32) {
        let owner = self.interned(&slice.service);
        slice.service = owner.clone();
        let holding = Arc::make_mut(self.by_service.entry(owner.clone()).or_default());
        match holding.find(&slice.name) {
            Ok(index) => holding.slices[index] = Known { object: slice, listing },
            Err(index) => {
                self.owners.insert(slice.name.clone(), owner);
                // Most Services have one, and keep one.
                holding.slices.reserve_exact(1);
                holding.slices.insert(index, Known { object: slice, listing });
            }
        }
    }

    /// Takes a Service away. Its numbering stays until [`Self::tidy`].
    pub(super) fn take_service(&mut self, name: &NamespacedName) -> Option<Service> {
        let service = self.holding(name)?.service.take()?;
        self.services -= 1;
        Some(service.object)
    }

    /// Takes a slice away; returns the Service it belonged to.
    pub(super) fn take_slice(&mut self, name: &NamespacedName) -> Option<NamespacedName> {
        let owner = self.owners.remove(name)?;
        let holding = Arc::make_mut(self.by_service.get_mut(&owner)?);
        if let Ok(index) = holding.find(name) {
            holding.slices.remove(index);
        }
        if holding.service.is_none() && holding.slices.is_empty() && holding.slots.is_empty() {
            self.by_service.remove(&owner);
        }
        Some(owner)
    }

    /// Forgets the numbering of a Service that is gone.
    pub(super) fn tidy(&mut self, name: &NamespacedName) {
        let Some(holding) = self.holding(name) else { return };
        if holding.service.is_none() {
            holding.slots = PortSlots::default();
            if holding.slices.is_empty() {
                self.by_service.remove(name);
            }
        }
    }

    /// The Services that the listing of this number did not name.
    pub(super) fn unnamed_services(&self, listing: u32) -> Vec<NamespacedName> {
        let known = self.by_service.values().filter_map(|holding| holding.service.as_ref());
        let old = known.filter(|known| known.listing != listing);
        old.map(|known| known.object.name.clone()).collect()
    }

    /// The slices that it did not name.
    pub(super) fn unnamed_slices(&self, listing: u32) -> Vec<NamespacedName> {
        let known = self.by_service.values().flat_map(|holding| &holding.slices);
        let old = known.filter(|known| known.listing != listing);
        old.map(|known| known.object.name.clone()).collect()
    }

    /// The name as it is stored already, if it is.
    fn interned(&self, name: &NamespacedName) -> NamespacedName {
        let stored = self.by_service.get_key_value(name).map(|(stored, _)| stored);
        stored.unwrap_or(name).clone()
    }
}
